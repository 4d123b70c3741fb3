"""Machines for tests: from a pool that all processes of a test run share, and what is known of one that failed.

The first process that wants a kind of machine starts its pool. The pool ends with the run's first process (of
pytest-xdist: the controller), however that ends.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkit.errors import ConfigError, MachineError, NameInUseError
from vmkit.forward.registry import read_kept
from vmkit.forward.start import remove
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.options import make_spec
from vmkit.machine.running import dmesg, logs
from vmkit.packets.control import open_control
from vmkit.packets.lines import render_line
from vmkit.pool.pool import PooledMachine, PoolGoneError, RunningPool, find_pool, start_pool
from vmkit.pool.registry import read_pools
from vsh.errors import VshError
from vsh.text import tail_lines

if TYPE_CHECKING:
    from vmkit.testing.wanted import Wanted

# A first pool builds its image and makes its snapshot.
TAKE_S = 300.0
EVIDENCE_LINES = 40
# So far back a panic is looked for, which prints some hundred lines; and what led to it stands before it.
MOST_LINES = 500
LINES_BEFORE = 5
PANIC = "Kernel panic - not syncing"


class Supply:
    """The pools of one test run. run: the process id that they end with. size: machines that wait in each.

    Invariant: at most one machine of this process is ending.
    """

    def __init__(self, run: int, size: int) -> None:
        self._run = run
        self._size = size
        self._pools: dict[str, RunningPool] = {}
        self._ending: PooledMachine | None = None

    def take(self, wanted: "Wanted") -> PooledMachine:
        """A fresh machine of this kind, which ends with this process at the latest. Raises VshError kinds."""
        try:
            machine = self._take(wanted)
        except PoolGoneError:
            # Another program has ended it.
            del self._pools[wanted.digest]
            machine = self._take(wanted)
        try:
            for path, content in wanted.files.items():
                _put(machine, path, content)
        except BaseException:
            machine.kill()
            raise
        return machine

    def end_machine(self, machine: PooledMachine) -> None:
        """Ends a machine, and the forwards that a test has made for it: no later machine has its name.

        The next test begins while its monitor cleans up.
        """
        self.finish()
        self._ending = machine
        # It may have ended meanwhile, and a test may have shut the runtime directory.
        with contextlib.suppress(VshError):
            stop.begin_kill(machine.find_entry())
        with contextlib.suppress(VshError):
            for kept in read_kept():
                if kept.machine == machine.name:
                    remove(kept)

    def finish(self) -> None:
        """Sees the machine gone whose end has begun."""
        machine, self._ending = self._ending, None
        if machine is not None:
            with contextlib.suppress(VshError):
                machine.kill()

    def end(self) -> None:
        """Ends the pools of this run, whichever process has started them."""
        # A pool that cannot be reached now ends with the run's first process.
        with contextlib.suppress(VshError):
            for entry in read_pools():
                if entry.name.startswith(self._prefix):
                    with contextlib.suppress(MachineError):
                        RunningPool(entry).stop()

    @property
    def _prefix(self) -> str:
        return f"test-{self._run}-"

    def _take(self, wanted: "Wanted") -> PooledMachine:
        pool = self._pools.get(wanted.digest)
        if pool is None:
            pool = self._pools[wanted.digest] = self._find_pool(wanted.digest, wanted.options)
        return pool.take(TAKE_S)

    def _find_pool(self, digest: str, options: Mapping[str, Any]) -> RunningPool:
        name = self._prefix + digest
        words = dict(options)
        spec = make_spec(str(words.pop("image", "tiny")), words)
        try:
            return RunningPool(start_pool(spec, size=self._size, name=name, owner=self._run))
        except NameInUseError:
            # Another process of this run was faster.
            return find_pool(name)


def read_evidence(machine: PooledMachine) -> dict[str, str]:
    """What explains a failure: the last lines of each log, by a title. The machine may have ended."""
    found: dict[str, str] = {}
    console = ""
    with contextlib.suppress(VshError, OSError):
        console = find_lines(logs(machine.name, "console"))
        found[f"console of {machine.name}"] = console
    with contextlib.suppress(VshError, OSError):
        found[f"events of {machine.name}"] = tail_lines(logs(machine.name, "events"), EVIDENCE_LINES)
    with contextlib.suppress(VshError, OSError):
        kernel = find_lines("\n".join(line.text for line in dmesg(machine.name)).encode())
        # A panic is on the console as well.
        if PANIC not in kernel or PANIC not in console:
            found[f"kernel log of {machine.name}"] = kernel
    # The device of a machine that has ended is gone.
    with contextlib.suppress(VshError, OSError), open_control(machine.directory / Layout.VSOCK_CONTROL) as device:
        packets = device.ask_recent()[-EVIDENCE_LINES:]
        found[f"last packets of {machine.name}"] = "\n".join(map(render_line, packets))
    return {title: text for title, text in found.items() if text.strip()}


def find_lines(log: bytes) -> str:
    """The lines of a log that explain a failure: from a panic on, else the last ones."""
    lines = tail_lines(log, MOST_LINES).split("\n")
    panics = [number for number, line in enumerate(lines) if PANIC in line]
    first = max(0, len(lines) - EVIDENCE_LINES)
    if panics:
        first = min(first, max(0, panics[0] - LINES_BEFORE))
    return "\n".join(lines[first : first + EVIDENCE_LINES])


def count_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _put(machine: PooledMachine, path: str, content: str | bytes | Path) -> None:
    if isinstance(content, bytes):
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1"'
        machine.run(["sh", "-c", script, "sh", path], input=content, check=True)
        return
    if not Path(content).exists():
        raise ConfigError(f"files of the marker vm: there is no {Path(content).absolute()}")
    machine.push(content, path)
