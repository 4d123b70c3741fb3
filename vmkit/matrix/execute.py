"""Runs cells in machines. Every machine is gone at the end in any case. vmkit.matrix.job decides which cell is next."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Condition
from typing import Protocol

from vmkit.errors import HostError, MachineError
from vmkit.junit import CaseVerdict
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult, count_results
from vmkit.machine import stop
from vmkit.machine.choose import Choices
from vmkit.machine.machine import Machine
from vmkit.machine.probe import read_available_memory_mib
from vmkit.machine.registry import find_state_directory
from vmkit.machine.running import read_log
from vmkit.machine.start import Started
from vmkit.matrix.outputs import KtapSink, Tail, TailSink
from vmkit.matrix.plan import Cell, GuestCommand, Matrix
from vmkit.matrix.results import CellFault, CellResult
from vsh.client import Client
from vsh.command import run_into
from vsh.ending import KERNEL_ENDS, Ending, read_ending
from vsh.errors import ExecError, VshError
from vsh.pump import TimedOut
from vsh.registry import find_machine
from vsh.text import clean_line, clean_text

# QEMU's own, the monitor's and the device's, beside the guest's memory.
OVERHEAD_MIB = 128
# The rest is the host's: its page cache makes the images fast.
MEMORY_SHARE = 0.8
# Of a command's output the end is kept.
MAX_OUTPUT_BYTES = 64 * 1024
LOOK_AGAIN_S = 0.2
# A guest on a busy host was late by more than 0.2 s.
SESSION_LINE_S = 5.0
LINE_PERIOD_S = 0.05


# The default reason of an end: a signal.
INTERRUPTED = "interrupted"


class ResultKeeper(Protocol):
    """What takes the results of a cell as they come, such as vmkit.matrix.cellfolder.CellFolder."""

    def set_machine(self, facts: dict[str, object]) -> None: ...

    def add(self, result: CellResult, seconds: float) -> None: ...

    def keep_logs(self, source: Path) -> None: ...


def find_jobs(matrix: Matrix, asked: int | None) -> int:
    """Returns how many machines run at once: `asked`, else one per CPU; never more than fit into memory."""
    fit = int(read_available_memory_mib() * MEMORY_SHARE) // (matrix.memory_mib + OVERHEAD_MIB)
    if fit < 1:
        raise HostError(
            f"there is not enough memory for one machine of {matrix.memory_mib} MiB", hint="set `memory` lower"
        )
    return max(1, min(fit, asked or os.cpu_count() or 1))


class MatrixRun:
    """The machines of one run. Invariant: `_names` has every machine that may run; none starts after end_all()."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._lock = Condition()
        self._names: set[str] = set()
        self._count = 0
        # Why no machine starts any more, and whose fault it is that a command has no result.
        self._end: tuple[str, CellFault] | None = None

    def is_cut(self, result: CellResult) -> bool:
        """Whether the end of this run took the result from a command, so that it says nothing of the cell."""
        return self._end is not None and result.verdict is CaseVerdict.ERROR and result.brief == self._end[0]

    def end_all(self, reason: str = INTERRUPTED, fault: CellFault = CellFault.MACHINE) -> None:
        """Ends every machine, and returns when none is left. A machine can be ended once it is in the registry."""
        self._end = self._end or (reason, fault)
        while names := self._read_names():
            for name in names:
                entry = find_machine(name=name)
                if entry is not None:
                    with contextlib.suppress(VshError):
                        stop.kill(entry)
            with self._lock:
                self._lock.wait_for(lambda: not self._names, LOOK_AGAIN_S)

    def _read_names(self) -> list[str]:
        with self._lock:
            return list(self._names)

    def run_cell(self, cell: Cell, keeper: ResultKeeper | None = None) -> list[CellResult]:
        """Runs the commands of a cell in a machine of its own. keeper: gets each result at once."""
        name, started_s, began_s = self._choose_name(), time.monotonic(), time.time()
        results: list[CellResult] = []

        def take(result: CellResult) -> None:
            results.append(self._settle(result))
            if keeper is not None and not self.is_cut(results[-1]):
                keeper.add(results[-1], time.monotonic() - started_s)

        try:
            with contextlib.ExitStack() as stack:
                machine: Machine | None = None
                try:
                    machine = self._make_machine(cell, name)
                    stack.enter_context(machine)
                except VshError as error:
                    if keeper is not None and machine is not None and machine.choices is not None:
                        keeper.set_machine(describe_choices(machine.choices))
                    ending = read_ending(name)
                    # Another process may have had this name.
                    if ending is not None and ending.at_s < began_s:
                        ending = None
                    for result in explain_start(cell, name, error, ending, time.monotonic() - started_s):
                        take(result)
                    if keeper is not None and ending is not None:
                        keeper.keep_logs(find_state_directory() / name)
                    return results
                if keeper is not None:
                    keeper.set_machine(describe_machine(machine.started))
                    # A kill in the first command leaves these.
                    session = keep_machine_logs(machine, keeper)
                for command in cell.commands:
                    take(self._run_command(cell, machine, command))
                    if keeper is not None:
                        session = keep_machine_logs(machine, keeper, session)
            return results
        finally:
            with self._lock:
                self._names.discard(name)
                self._lock.notify_all()

    def _settle(self, result: CellResult) -> CellResult:
        """A command without a result, because this run ended it or did not start it, has that as its reason."""
        if self._end is None or result.verdict is not CaseVerdict.ERROR:
            return result
        return replace(result, brief=self._end[0], fault=self._end[1])

    def _choose_name(self) -> str:
        with self._lock:
            self._count += 1
            name = f"matrix-{os.getpid()}-{self._count}"
            self._names.add(name)
        return name

    def _make_machine(self, cell: Cell, name: str) -> Machine:
        if self._end is not None:
            raise MachineError(self._end[0])
        return Machine(
            cell.image,
            name=name,
            backend=cell.backend,
            arch=cell.architecture,
            kernel=cell.kernel,
            # A matrix is there to see kernels and images boot.
            boot=True,
            **self._matrix.options,
        )

    def _run_command(self, cell: Cell, machine: Machine, command: GuestCommand) -> CellResult:
        place = machine.started.name, machine.started.monitor.pid
        if command.has_ktap:
            return run_tests(cell, machine.connect, command, self._matrix.timeout_s, place)
        started_s = time.monotonic()
        try:
            result = machine.run(command.argv, timeout=self._matrix.timeout_s)
        except VshError as error:
            return CellResult(
                cell,
                command,
                CaseVerdict.ERROR,
                time.monotonic() - started_s,
                clean_line(error.brief),
                clean_text(error.details),
                fault=find_fault(error, read_ending(*place)),
            )
        text = clean_text((result.stdout + result.stderr)[-MAX_OUTPUT_BYTES:])
        verdict, fault = (CaseVerdict.FAILED, CellFault.TEST) if result.exit else (CaseVerdict.PASSED, CellFault.NONE)
        seconds = time.monotonic() - started_s
        return CellResult(cell, command, verdict, seconds, f"status {result.exit}", text, fault=fault)


def explain_start(cell: Cell, name: str, error: VshError, ending: Ending | None, seconds: float) -> list[CellResult]:
    """Returns the results of a cell whose machine did not start. ending: how it ended, if it began to run."""
    # A backend or an accelerator that was asked for, and this host has not.
    skipped = isinstance(error, HostError) and cell.backend == "vhost"
    verdict = CaseVerdict.SKIPPED if skipped else CaseVerdict.ERROR
    fault = CellFault.NONE if skipped else find_fault(error, ending)
    text = clean_text("\n".join(filter(None, (error.brief, error.details, error.hint))))
    brief = clean_line(error.brief)
    tests = read_boot_tests(name, brief) if any(command.has_ktap for command in cell.commands) else ()
    return [
        CellResult(cell, command, verdict, seconds, brief, text, tests if command.has_ktap else (), fault)
        for command in cell.commands
    ]


def find_fault(error: VshError, ending: Ending | None) -> CellFault:
    """Returns whose fault it is that a command has no result. ending: of its machine, if it has ended."""
    if isinstance(error, TimedOut):
        return CellFault.TIME
    if isinstance(error, ExecError):
        # The guest has answered: it has no such program.
        return CellFault.TEST
    return CellFault.TEST if ending is not None and ending.reason in KERNEL_ENDS else CellFault.MACHINE


def describe_machine(started: Started) -> dict[str, object]:
    """Returns what a record has of a machine that is ready."""
    return {
        **describe_choices(started.choices),
        "started_by": started.started_by,
        "seconds": round(started.seconds, 3),
    }


def describe_choices(choices: Choices) -> dict[str, object]:
    """Returns what a record has of a machine that is not ready: its failure may be due to these."""
    return {
        "image_digest": choices.built.digest,
        "qemu": choices.qemu.render_version(),
        "accelerator": choices.accelerator.value,
        "accelerator_reason": choices.accelerator_reason,
        "backend": choices.backend.value,
        "started_by": None,
        "seconds": None,
    }


def keep_machine_logs(machine: Machine, keeper: ResultKeeper, before: bytes | None = None) -> bytes:
    """Keeps the logs until now of a machine that runs, or of one that has ended badly. Returns its last session's line.

    before: that line, from before a session that has ended. The logs must have a newer one, for SESSION_LINE_S at most:
    vshd writes it after the client knows the end. Lines are not counted, for a kernel's log loses the oldest.
    """
    deadline_s = time.monotonic() + SESSION_LINE_S
    last = before or b""
    with contextlib.suppress(VshError):
        # It reads the kernel's log out of the guest's memory, into a file beside the others.
        while (last := read_last_session(machine)) == before and time.monotonic() < deadline_s:
            time.sleep(LINE_PERIOD_S)
    kept = find_state_directory() / machine.name
    keeper.keep_logs(machine.directory if machine.directory.is_dir() else kept)
    return last


def read_last_session(machine: Machine) -> bytes:
    """Returns the line of the session that ended last; empty where the kernel's log has none. Raises VshError."""
    return b"".join(machine.read_log("sessions").splitlines()[-1:])


def read_boot_tests(name: str, cause: str) -> tuple[KtapResult, ...]:
    """Returns the tests that a kernel ran in its boot, from the kept logs of a machine that did not start.

    They are there before the failure is reported, while the machine's own folder may go at any time.
    """
    folder = find_state_directory() / name
    for kind in ("kernel", "console"):
        parser = KtapParser()
        results: list[KtapResult] = []
        with contextlib.suppress(VshError):
            for data in read_log(folder, kind):
                results += parser.receive_data(data)
        results += parser.receive_end(cause)
        if parser.has_found:
            return tuple(results)
    return ()


def run_tests(
    cell: Cell,
    connect: Callable[[], Client],
    command: GuestCommand,
    timeout_s: float,
    place: tuple[str, int] | None = None,
) -> CellResult:
    """Runs a command that prints test results. What it printed before an error counts.

    place: the machine's name, and its monitor's pid.
    """
    started_s = time.monotonic()
    tail = Tail(MAX_OUTPUT_BYTES)
    # Of stdout alone: the streams come in pieces, and one may break a line of the other.
    sink = KtapSink(tail)
    verdict, fault, cause, details = CaseVerdict.PASSED, CellFault.NONE, "", ""
    try:
        status = run_into(connect(), command.argv, sink, TailSink(tail), timeout_s)
        if status:
            verdict, fault, cause = CaseVerdict.FAILED, CellFault.TEST, f"status {status}"
    except VshError as error:
        verdict, cause, details = CaseVerdict.ERROR, clean_line(error.brief), clean_text(error.details)
        fault = find_fault(error, read_ending(*place) if place else None)
    tests = sink.finish(cause)
    text = "\n".join(filter(None, (clean_text(tail.read()), details)))
    if not sink.has_found and verdict is not CaseVerdict.ERROR:
        verdict, fault = CaseVerdict.ERROR, CellFault.TEST
        cause = ", ".join(filter(None, ("it printed no test results", cause)))
    bad = sum(test.is_bad for test in tests)
    if bad and verdict is not CaseVerdict.ERROR:
        verdict, fault = CaseVerdict.FAILED, CellFault.TEST
    brief = ", ".join(filter(None, (cause, count_results(tests) if tests else "")))
    return CellResult(cell, command, verdict, time.monotonic() - started_s, brief, text, tests, fault)
