"""The Python API: a machine is a with-block.

with vmkit.Machine("tiny") as machine:
    result = machine.run(["uname", "-a"])
    print(result.stdout, result.exit)
"""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmkit.errors import MachineError
from vmkit.machine import stop
from vmkit.machine.choose import Choices
from vmkit.machine.options import OPTIONS, make_spec
from vmkit.machine.running import MachineHandle, explain_ending
from vmkit.machine.spec import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, DEFAULT_TIMEOUT_S, MachineSpec
from vmkit.machine.start import Started, start_machine
from vmkit.stored.place import is_stored
from vsh.ending import read_ending
from vsh.registry import Entry, find_machine


class Machine(MachineHandle):
    """One virtual machine of an image, started when the block is entered and gone when it is left.

    A machine of a with-block lives no longer than its process, even when SIGKILL ends that. One of start() does.

    image: a shipped image's name, a recipe's path, the name of a machine that `vmkit create` made, or what the root is.
    A root is a disk, a folder or a tar by its path, with a slash, or a container image (`docker://NAME`). memory: MiB
    as a number, or text such as "1G". timeout_s: the deadline for READY. token: demand the machine's token, as the
    backend vhost always does. arch: of the guest, "amd64" by default; "arm64", "riscv64" and "s390x" are emulated. What
    is None is chosen: the name after the image, the lowest free CID from 3 on, KVM where it is proven to work, vhost
    where it is there.

    root: an ext4 instead of the image's disk, or what the image `any` has as its root; partition: in that disk. disks:
    files the guest has as disks and may read; rwdisks: may write, after those. gdb: serve gdb's remote protocol on the
    socket `gdb.sock` in the machine's directory. gdb_port: on this port of the host's loopback, where every user of the
    host can take the guest over. cpu: as QEMU's -cpu. netdev: a network device, by QEMU's -netdev without an id
    (otherwise there is none). record: the folder of the host into which every vsh records its sessions of this machine;
    sessions of Python are not recorded. vmcore: keep a dump of the memory when the kernel panics, as an `elf` or a
    compressed `kdump` (see `vmkit crashes`). cores: keep the core dumps of the guest's programs, and its failed
    services. init: pid 1 of a root of yours: its `systemd`, vmkit's own (`none`), or systemd where there is one
    (`auto`). user_data: what its cloud-init does, a file. on_reset: what a reset of the guest does: `end` the machine,
    or `restart` it, as a reboot should. boot: boot it, although there is a snapshot of it. snapshot: start it from the
    one that `vmkit snapshot save NAME` made, with its image and options.

    A stored machine has the options that it was created with, but for those that you give here with another value than
    the default. At the end of its block the guest powers off, so that its disk has all that was written.
    """

    def __init__(  # noqa: PLR0913  (a machine is its options)
        self,
        image: str = "tiny",
        *,
        name: str | None = None,
        cid: int | None = None,
        memory: int | str = DEFAULT_MEMORY_MIB,
        cpus: int = DEFAULT_CPUS,
        accelerator: str | None = None,
        backend: str | None = None,
        arch: str | None = None,
        kernel: str | Path | None = None,
        append: str = "",
        tree: str | Path | None = None,
        modules: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_reset: str = "end",
        token: bool = False,
        root: str | Path | None = None,
        root_from: str | Path | None = None,
        partition: int | None = None,
        disks: Sequence[str | Path] = (),
        rwdisks: Sequence[str | Path] = (),
        gdb: bool = False,
        gdb_port: int | None = None,
        cpu: str | None = None,
        netdev: str | None = None,
        record: str | Path | None = None,
        vmcore: str | None = None,
        cores: bool = False,
        init: str = "auto",
        user_data: str | Path | None = None,
        boot: bool = False,
        snapshot: str | None = None,
    ) -> None:
        # The signature is the table's, so its names are the options'.
        options = {key: value for key, value in locals().items() if key not in ("self", "image")}
        self.spec = _find_spec(image, options)
        self._started: Started | None = None
        self._choices: Choices | None = None
        # The process that entered the block.
        self._owner_pid = 0

    def __enter__(self) -> Self:
        self._owner_pid = os.getpid()
        self._start(None, is_owned=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A forked child may leave the block as well, and the machine is its parent's.
        if os.getpid() != self._owner_pid:
            return
        try:
            if self.spec.stored is not None and self._started is not None:
                # What it keeps is in the guest's memory until the guest ends.
                self.down()
        finally:
            self.kill()

    @property
    def name(self) -> str:
        """The name it runs under."""
        return self._require().name

    @property
    def cid(self) -> int:
        """Its vsock context id."""
        return self._require().cid

    @property
    def directory(self) -> Path:
        """Its directory below the runtime directory: sockets and logs, for as long as it runs."""
        return self._require().directory

    @property
    def started(self) -> Started:
        """How it was started: the choices and the seconds until READY."""
        return self._require()

    @property
    def choices(self) -> Choices | None:
        """What was chosen for it on this host. None: its start has not come so far, or failed before."""
        return self._choices

    def start(self, tell: Callable[[str, float | None], None] | None = None) -> None:
        """Starts it and waits until it is ready. Raises VshError kinds.

        It lives until down(), kill(), `vmkit down` or the guest's own end, as after `vmkit up`: this process may end.
        """
        self._start(tell, is_owned=False)

    def _start(self, tell: Callable[[str, float | None], None] | None, *, is_owned: bool) -> None:
        if self._started is not None:
            raise MachineError(f"'{self._started.name}' was started already")
        self._started = start_machine(self.spec, tell=tell, on_choices=self._take_choices, is_owned=is_owned)

    def _take_choices(self, choices: Choices) -> None:
        self._choices = choices

    def down(self) -> None:
        """Asks the guest to power off and waits until it is gone."""
        self._require()
        self._end(stop.power_off)

    def kill(self) -> None:
        """Ends it at once; nothing happens when it has ended."""
        if self._started is not None:
            self._end(stop.kill)

    def _end(self, end: Callable[[Entry], None]) -> None:
        end_started(self._require(), end)
        self._started = None

    def find_entry(self) -> Entry:
        entry = self._look_up()
        if entry is None:
            started = self._require()
            raise explain_ending(started.name, read_ending(started.name, started.monitor.pid))
        return entry

    def _look_up(self) -> Entry | None:
        return find_started(self._require())

    def _require(self) -> Started:
        if self._started is None:
            raise MachineError("the machine is not started", hint="use it in a with-block, or call start()")
        return self._started


def _find_spec(image: str, options: Mapping[str, Any]) -> MachineSpec:
    """A stored machine of that name comes before an image, as for `vmkit up`. Raises VshError kinds."""
    # `is_stored` takes text, and what is none is make_spec's to refuse.
    if not isinstance(image, str) or not is_stored(image):
        return make_spec(image, options)
    from vmkit.machine.stored import make_stored_spec  # noqa: PLC0415 - most machines are of an image

    defaults = {option.name: option.default for option in OPTIONS}
    return make_stored_spec(image, {name: value for name, value in options.items() if value != defaults[name]})


def find_started(started: Started) -> Entry | None:
    """The entry of this very machine: when it has ended, another `up` may have taken its name."""
    entry = find_machine(name=started.name)
    return entry if entry is not None and entry.pid == started.monitor.pid else None


def end_started(started: Started, end: Callable[[Entry], None]) -> None:
    """Ends a machine by `end`, if it runs, and sees its monitor gone."""
    entry = find_started(started)
    if entry is not None:
        end(entry)
    try:
        started.monitor.wait(stop.KILL_DEADLINE_S)
    except subprocess.TimeoutExpired:
        # QEMU and the device die with it.
        started.monitor.kill()
        started.monitor.wait()
