"""Runs cells side by side, as many as fit into the host's memory. Every machine is gone at the end in any case."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Condition, Event

from vmkit.errors import HostError
from vmkit.junit import CaseVerdict
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult, count_results
from vmkit.machine import stop
from vmkit.machine.machine import Machine
from vmkit.machine.probe import read_available_memory_mib
from vmkit.machine.registry import find_state_directory
from vmkit.machine.running import read_log
from vmkit.matrix.outputs import KtapSink, Tail, TailSink
from vmkit.matrix.plan import Cell, GuestCommand, Matrix
from vsh.client import Client
from vsh.command import run_into
from vsh.errors import VshError
from vsh.registry import find_machine
from vsh.text import clean_line, clean_text

# QEMU's own, the monitor's and the device's, beside the guest's memory.
OVERHEAD_MIB = 128
# The rest is the host's: its page cache makes the images fast.
MEMORY_SHARE = 0.8
# Of a command's output the end is kept.
MAX_OUTPUT_BYTES = 64 * 1024
LOOK_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class CellResult:
    """The result of one command of one cell. failed: the command's status was not 0; error: it could not be run;
    skipped: the host cannot do this. text: its output, or why there is none. brief and text have no control
    characters that change a terminal. tests: the results that it printed, if the matrix asks for them; then it has
    failed if one of them has.
    """

    cell: Cell
    command: GuestCommand
    verdict: CaseVerdict
    seconds: float
    brief: str
    text: str = ""
    tests: tuple[KtapResult, ...] = ()


Tell = Callable[[str, float | None], None]


def find_jobs(matrix: Matrix, asked: int | None) -> int:
    """Returns how many machines run at once: `asked`, else one per CPU; never more than fit into memory."""
    fit = int(read_available_memory_mib() * MEMORY_SHARE) // (matrix.memory_mib + OVERHEAD_MIB)
    if fit < 1:
        raise HostError(
            f"there is not enough memory for one machine of {matrix.memory_mib} MiB", hint="set `memory` lower"
        )
    return max(1, min(fit, asked or os.cpu_count() or 1))


def run_cells(matrix: Matrix, cells: Sequence[Cell], jobs: int, tell: Tell) -> list[CellResult]:
    """Runs the cells and returns a result for every command, in the order of the cells."""
    run = MatrixRun(matrix)
    outcomes: dict[str, list[CellResult]] = {}
    with ThreadPoolExecutor(jobs, thread_name_prefix="cell") as pool:
        futures: dict[Future[list[CellResult]], Cell] = {}
        try:
            for cell in cells:
                futures[pool.submit(run.run_cell, cell)] = cell
            for future in as_completed(futures):
                cell = futures[future]
                outcomes[cell.name] = future.result()
                verdicts = ", ".join(f"{o.command.name} {o.verdict}" for o in outcomes[cell.name])
                tell(f"{cell.name}: {verdicts} ({len(outcomes)} of {len(cells)})", None)
        except BaseException:
            for future in futures:
                future.cancel()
            # Not wait(futures): a signal may have come between the start of a cell and its entry there.
            run.end_all()
            raise
    return [outcome for cell in cells for outcome in outcomes[cell.name]]


class MatrixRun:
    """The machines of one run. Invariant: `_names` has every machine that may run; none starts after `_ended`."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._ended = Event()
        self._lock = Condition()
        self._names: set[str] = set()
        self._count = 0

    def end_all(self) -> None:
        """Ends every machine, and returns when none is left. A machine can be ended once it is in the registry."""
        self._ended.set()
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

    def run_cell(self, cell: Cell) -> list[CellResult]:
        name = self._choose_name()
        started_s = time.monotonic()
        try:
            with self._make_machine(cell, name) as machine:
                return [self._run_command(cell, machine, command) for command in cell.commands]
        except VshError as error:
            # A backend or an accelerator that was asked for, and this host has not.
            skipped = isinstance(error, HostError) and cell.backend == "vhost"
            verdict = CaseVerdict.SKIPPED if skipped else CaseVerdict.ERROR
            seconds = time.monotonic() - started_s
            text = clean_text("\n".join(filter(None, (error.brief, error.details, error.hint))))
            brief = clean_line(error.brief)
            tests = read_boot_tests(name, brief) if any(command.has_ktap for command in cell.commands) else ()
            return [
                CellResult(cell, command, verdict, seconds, brief, text, tests if command.has_ktap else ())
                for command in cell.commands
            ]
        finally:
            with self._lock:
                self._names.discard(name)
                self._lock.notify_all()

    def _choose_name(self) -> str:
        with self._lock:
            self._count += 1
            name = f"matrix-{os.getpid()}-{self._count}"
            self._names.add(name)
        return name

    def _make_machine(self, cell: Cell, name: str) -> Machine:
        if self._ended.is_set():
            raise HostError("interrupted")
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
        if command.has_ktap:
            return run_tests(cell, machine.connect, command, self._matrix.timeout_s)
        started_s = time.monotonic()
        try:
            result = machine.run(command.argv, timeout=self._matrix.timeout_s)
        except VshError as error:
            brief, text = clean_line(error.brief), clean_text(error.details)
            return CellResult(cell, command, CaseVerdict.ERROR, time.monotonic() - started_s, brief, text)
        text = clean_text((result.stdout + result.stderr)[-MAX_OUTPUT_BYTES:])
        verdict = CaseVerdict.PASSED if result.exit == 0 else CaseVerdict.FAILED
        return CellResult(cell, command, verdict, time.monotonic() - started_s, f"status {result.exit}", text)


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


def run_tests(cell: Cell, connect: Callable[[], Client], command: GuestCommand, timeout_s: float) -> CellResult:
    """Runs a command that prints test results. What it printed before an error counts."""
    started_s = time.monotonic()
    tail = Tail(MAX_OUTPUT_BYTES)
    # Of stdout alone: the streams come in pieces, and one may break a line of the other.
    sink = KtapSink(tail)
    verdict, cause, details = CaseVerdict.PASSED, "", ""
    try:
        status = run_into(connect(), command.argv, sink, TailSink(tail), timeout_s)
        if status:
            verdict, cause = CaseVerdict.FAILED, f"status {status}"
    except VshError as error:
        verdict, cause, details = CaseVerdict.ERROR, clean_line(error.brief), clean_text(error.details)
    tests = sink.finish(cause)
    text = "\n".join(filter(None, (clean_text(tail.read()), details)))
    if not sink.has_found and verdict is not CaseVerdict.ERROR:
        verdict, cause = CaseVerdict.ERROR, ", ".join(filter(None, ("it printed no test results", cause)))
    bad = sum(test.is_bad for test in tests)
    if bad and verdict is not CaseVerdict.ERROR:
        verdict = CaseVerdict.FAILED
    brief = ", ".join(filter(None, (cause, count_results(tests) if tests else "")))
    return CellResult(cell, command, verdict, time.monotonic() - started_s, brief, text, tests)
