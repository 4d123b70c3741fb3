"""Pools in Python: start one, take machines from it, stop it.

with vmkit.Pool("tiny", size=4) as pool, pool.take() as machine:
    print(machine.run(["uname", "-a"], text=True).stdout)
"""

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmkit.errors import ConfigError, HostError, MachineError, NameInUseError
from vmkit.machine import pause, stop
from vmkit.machine.choose import choose
from vmkit.machine.options import make_spec
from vmkit.machine.probe import read_available_memory_mib
from vmkit.machine.programs import start_program
from vmkit.machine.restore import find_obstacle
from vmkit.machine.running import RunningMachine
from vmkit.machine.save import HasSystemdError, make_snapshot
from vmkit.machine.source import ANY, name_machine, take_source
from vmkit.machine.spec import MAX_NAME_CHARACTERS, MachineSpec, check_name
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.pool.keeper import BESIDE_MIB, LENGTH_BYTES, SPARE_MIB, Order
from vmkit.pool.registry import CONTROL, PoolEntry, pick_pool, read_pools
from vmkit.pool.stock import SIZE_MAX
from vmkit.pool.words import (
    MAX_LINE_BYTES,
    TAKEN,
    PoolLineError,
    Status,
    Verb,
    parse_answer,
    parse_status,
    render_request,
)
from vsh.ending import Ending, read_ending
from vsh.registry import find_machine, read_machines

Tell = Callable[[str, float | None], None]

DEFAULT_SIZE = 4
DEFAULT_TAKE_S = 60.0
# A keeper answers as soon as its interpreter is up.
START_DEADLINE_S = 30.0
# A monitor answers within milliseconds; this much it gets where the caller's time is over.
TAKE_MIN_S = 1.0
STATUS_DEADLINE_S = 10.0
STOP_DEADLINE_S = 20.0
# Of a machine's memory, so much is in use after its boot; the rest only a busy guest takes.
WAITING_PART = 0.6
# They belong to one machine, and a pool has many.
NOT_POOLED = (
    *("name", "cid", "rwdisks", "gdb", "gdb_port", "init", "partition", "root_from", "user_data"),
    *("on_reset", "vmcore", "cores"),
)
# The longest `-NUMBER` behind a pool's name.
NUMBER_CHARACTERS = 7


class PoolGoneError(MachineError):
    """The keeper of a pool is gone."""


class NoAnswerError(MachineError):
    """The keeper of a pool is there, and sends nothing."""


class PooledMachine(RunningMachine):
    """A machine that was taken from a pool. As a with-block it ends with the block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # It may have ended meanwhile.
        with contextlib.suppress(MachineError):
            self.kill()

    def find_ending(self) -> Ending | None:
        """How the machine has ended; None while it runs."""
        return read_ending(self.name, self._entry.pid)

    def disown(self) -> None:
        """The machine goes on when this process ends, as after `vmkit up`. Raises MachineError."""
        pause.disown(self.find_entry())


class RunningPool:
    """A pool that any process may have started."""

    def __init__(self, entry: PoolEntry) -> None:
        self._entry = entry
        self.name = entry.name

    def take(self, timeout: float = DEFAULT_TAKE_S, *, is_owned: bool = True) -> PooledMachine:
        """A machine that no other caller gets. Waits for one at most `timeout` seconds.

        is_owned: the machine lives no longer than this process. Raises MachineError.
        """
        deadline_s = time.monotonic() + timeout
        while True:
            with self._ask(Verb.TAKE, timeout) as sock:
                try:
                    answer = self._receive(sock, deadline_s)
                except NoAnswerError:
                    break
                entry = find_machine(name=str(answer.get("machine")))
                if entry is not None:
                    try:
                        # Owned at first: where this process is killed now, the machine ends as well.
                        pause.take(entry, os.getpid(), max(TAKE_MIN_S, deadline_s - time.monotonic()))
                        with contextlib.suppress(OSError):
                            sock.sendall(TAKEN)
                        if not is_owned:
                            pause.disown(entry)
                    except MachineError:
                        # It ended a moment ago, and the keeper has others.
                        if time.monotonic() > deadline_s:
                            raise
                    else:
                        return PooledMachine(find_machine(name=entry.name) or entry)
            if time.monotonic() > deadline_s:
                break
        brief = f"the pool '{self.name}' had no machine within {timeout:g} s"
        raise MachineError(brief, hint="vmkit pool status shows why")

    def status(self) -> Status:
        """The pool at this moment. Raises MachineError."""
        with self._ask(Verb.STATUS, STATUS_DEADLINE_S) as sock:
            return parse_status(self._receive(sock, time.monotonic() + STATUS_DEADLINE_S))

    def stop(self) -> None:
        """Ends the pool and its machines; those that were taken run on. Raises MachineError.

        A keeper that does not answer is killed, and its machines end with it.
        """
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        try:
            keeper = os.pidfd_open(self._entry.pid)
        except ProcessLookupError:
            return
        try:
            machines = self._ask_to_stop(keeper)
            if not select.select([keeper], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise MachineError(f"the keeper of the pool '{self.name}' does not end: process {self._entry.pid}")
        finally:
            os.close(keeper)
        for name in machines:
            _await_gone(name, deadline_s)

    def _ask_to_stop(self, keeper: int) -> list[str]:
        """The machines that end with the keeper."""
        try:
            with self._ask(Verb.STOP, STATUS_DEADLINE_S) as sock:
                machines = self._receive(sock, time.monotonic() + STATUS_DEADLINE_S).get("machines")
        except NoAnswerError:
            # Read before: machines that end are no longer called pooled.
            waiting = [entry for entry in read_machines() if entry.state == "pooled"]
            signal.pidfd_send_signal(keeper, signal.SIGKILL)
            return [entry.name for entry in waiting if entry.name.rpartition("-")[0] == self.name]
        except PoolGoneError:
            # Another ends it at this moment.
            return []
        return [str(name) for name in machines] if isinstance(machines, list) else []

    def _ask(self, verb: Verb, timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(self._entry.directory / CONTROL))
            sock.sendall(render_request(verb))
        except OSError as error:
            sock.close()
            raise PoolGoneError(f"the pool '{self.name}' has ended", hint="vmkit pool status") from error
        return sock

    def _receive(self, sock: socket.socket, deadline_s: float) -> dict[str, object]:
        line = b""
        while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            sock.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                data = sock.recv(MAX_LINE_BYTES)
            except TimeoutError as error:
                raise NoAnswerError(
                    f"the keeper of the pool '{self.name}' did not answer in time",
                    hint=f"vmkit pool stop {self.name} ends it and its machines",
                ) from error
            except OSError:
                data = b""
            if not data:
                raise PoolGoneError(f"the pool '{self.name}' has ended", hint="vmkit pool status")
            line += data
        try:
            answer = parse_answer(line)
        except PoolLineError as error:
            raise MachineError(f"the keeper of the pool '{self.name}' sent nonsense", details=str(error)) from error
        if "error" in answer and "name" not in answer:
            raise MachineError(str(answer["error"]), hint=str(answer.get("hint", "")))
        return answer


class Pool(RunningPool):
    """Machines of one image that are restored, warmed and paused before they are needed, as a with-block.

    Each take() gets another one; the keeper makes the next. All end with the block, and with this process.

    image, options: as for Machine, without name, cid, rwdisks, gdb and gdb_port. size: how many wait. name: of the
    pool, and of its machines with a number behind it.
    """

    def __init__(
        self, image: str = "tiny", *, size: int = DEFAULT_SIZE, name: str | None = None, **options: Any
    ) -> None:
        unknown = [option for option in options if option in NOT_POOLED]
        if unknown:
            raise ConfigError(f"the machines of a pool cannot have the option '{unknown[0]}'")
        self.spec = make_spec(image, options)
        self._size = size
        self._asked_name = name

    def __enter__(self) -> Self:
        super().__init__(start_pool(self.spec, size=self._size, name=self._asked_name, owner=os.getpid()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def find_pool(name: str | None = None) -> RunningPool:
    """The running pool of that name; None: the only one. Raises MachineError."""
    return RunningPool(pick_pool(name))


def start_pool(
    spec: MachineSpec, *, size: int = DEFAULT_SIZE, name: str | None = None, owner: int = 0, tell: Tell | None = None
) -> PoolEntry:
    """Starts a pool of machines of this spec; makes their snapshot first. Raises VshError kinds.

    owner: the process id that the pool ends with; 0: none.
    """
    say = tell or (lambda _text, _fraction: None)
    if not 1 <= size <= SIZE_MAX:
        raise ConfigError(f"--size must be between 1 and {SIZE_MAX}, not {size}")
    spec = take_source(replace(spec, image=_find_image(spec.image)), say)
    chosen = _choose_name(name, spec)
    obstacle = find_obstacle(spec, choose(spec, say, KernelVhostDoor()))
    if obstacle:
        say(f"machines of this pool boot: {obstacle}", None)
    elif spec.snapshot is None and not spec.boot:
        try:
            make_snapshot(spec, tell=say)
        except HasSystemdError as error:
            say(f"machines of this pool boot: {error.brief.partition(': ')[2]}", None)
    return start_keeper(Order(spec, chosen, shrink(size, spec.memory_mib, say), owner))


def shrink(size: int, memory_mib: int, tell: Tell, available_mib: int | None = None) -> int:
    """How many machines of this memory the host has room for, at most `size` and at least one."""
    if available_mib is None:
        available_mib = read_available_memory_mib()
    each_mib = int(memory_mib * WAITING_PART) + BESIDE_MIB
    fitting = max(1, (available_mib - SPARE_MIB) // each_mib)
    if available_mib and fitting < size:
        tell(f"{available_mib} MiB of memory are available: the pool has {fitting} machines, not {size}", None)
        return fitting
    return size


def _choose_name(name: str | None, spec: MachineSpec) -> str:
    if name is None:
        taken = {pool.name for pool in read_pools()}
        root = spec.source or spec.root
        base = Path(spec.image).stem if root is None or spec.image != ANY else name_machine(root)
        stem = base[: MAX_NAME_CHARACTERS - 2 * NUMBER_CHARACTERS]
        names = (f"{stem}-pool", *(f"{stem}-pool{number}" for number in range(2, 100)))
        name = next((name for name in names if name not in taken), names[-1])
    check_name(name)
    if len(name) + NUMBER_CHARACTERS > MAX_NAME_CHARACTERS:
        limit = MAX_NAME_CHARACTERS - NUMBER_CHARACTERS
        raise ConfigError(f"a pool's name must have at most {limit} characters, not {len(name)}")
    return name


def _find_image(image: str) -> str:
    """The keeper has another working directory."""
    is_path = "/" in image or image.endswith(".toml")
    return str(Path(image).expanduser().absolute()) if is_path else image


def start_keeper(order: Order) -> PoolEntry:
    """Starts the process of a pool, and returns when others can find it. Raises VshError kinds."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start_program("vmkit.pool", theirs, subprocess.DEVNULL)
        try:
            text = pickle.dumps(order)
            ours.settimeout(START_DEADLINE_S)
            try:
                ours.sendall(len(text).to_bytes(LENGTH_BYTES, "little") + text)
                line = ours.makefile("rb").readline(MAX_LINE_BYTES)
            except OSError as error:
                raise HostError("the keeper of the pool does not answer") from error
            if not line:
                raise HostError("the keeper of the pool ended at once")
            answer = parse_answer(line)
            if "error" in answer:
                kind = NameInUseError if answer.get("is_taken") else HostError
                raise kind(str(answer["error"]), hint=str(answer.get("hint", "")))
            return pick_pool(order.name)
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _await_gone(name: str, deadline_s: float) -> None:
    """A machine that was being made ends when the keeper does. No descriptor of another process's child says so."""
    while (entry := find_machine(name=name)) is not None and time.monotonic() < deadline_s:
        if entry.state == "pooled":
            with contextlib.suppress(MachineError):
                stop.kill(entry)
        time.sleep(0.01)
