"""One job: runs its cells side by side until the schedule is over, and keeps what they gave in their folders."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from vmkit.errors import ConfigError
from vmkit.junit import CaseVerdict
from vmkit.matrix.cellfolder import CellFolder, name_folder, open_cell, open_results
from vmkit.matrix.execute import MatrixRun
from vmkit.matrix.lock import MatrixLock, find_content
from vmkit.matrix.plan import Cell, Matrix
from vmkit.matrix.results import NOT_RUN, STATUSES, CellFault, CellRecord, CellResult, name_verdict, pick_fault
from vmkit.matrix.schedule import Policy, Schedule
from vshd.wire.version import __version__

DEADLINE = "the deadline of the run has passed"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """numbers: of the cells to run, in the matrix. results: the folder for what they give; None: it is not kept.

    deadline_s: for the whole job. found: what its cells run here; without it, a kept result is of any image and kernel.
    """

    matrix: Matrix
    numbers: Sequence[int]
    jobs: int
    results: Path | None = None
    policy: Policy = field(default_factory=Policy)
    deadline_s: float | None = None
    found: MatrixLock | None = None


@dataclass(frozen=True, slots=True)
class CellEnd:
    """One attempt at a cell that has ended. is_kept: an earlier run had it. is_repeated: the cell runs again."""

    number: int
    cell: Cell
    results: tuple[CellResult, ...]
    attempt: int
    seconds: float
    is_kept: bool = False
    is_repeated: bool = False

    @property
    def fault(self) -> CellFault:
        return pick_fault(result.fault for result in self.results)

    @property
    def verdict(self) -> str:
        """As in the cell's record."""
        return name_verdict(self.fault, [result.verdict for result in self.results])

    def render_event(self) -> dict[str, object]:
        """Returns what a program is told of it."""
        return {
            "event": "cell",
            "cell": self.cell.name,
            "number": self.number,
            "verdict": self.verdict,
            "status": STATUSES[self.fault],
            "seconds": round(self.seconds, 3),
            "attempt": self.attempt,
            "kept": self.is_kept,
            "repeated": self.is_repeated,
            "commands": {result.command.name: result.verdict for result in self.results},
        }


@dataclass(frozen=True, slots=True)
class JobEnd:
    """What a job gave: the results of its cells in their order, and why some did not run."""

    results: tuple[CellResult, ...]
    dropped: tuple[str, ...] = ()
    stopped: str = ""

    @property
    def fault(self) -> CellFault:
        """A cell that did not run because others failed is not counted again."""
        late = [CellFault.TIME] if self.stopped == DEADLINE else []
        return pick_fault([*(result.fault for result in self.results), *late])

    def render_event(self) -> dict[str, object]:
        """Returns what a program is told of it."""
        return {
            "event": "end",
            "status": STATUSES[self.fault],
            "dropped": list(self.dropped),
            "stopped": self.stopped,
        }


Watch = Callable[[CellEnd], None]


def run_job(plan: JobPlan, watch: Watch) -> JobEnd:
    """Runs the cells, and leaves no machine. watch: gets the end of each attempt. Raises VshError kinds."""
    if plan.results is not None:
        open_results(plan.results, plan.matrix)
    return _Job(plan, watch).run()


class _Job:
    """Invariant: `_ends` has the deciding attempt of each cell that is done."""

    def __init__(self, plan: JobPlan, watch: Watch) -> None:
        self._plan = plan
        self._watch = watch
        self._run = MatrixRun(plan.matrix)
        self._digest = plan.matrix.digest
        self._schedule = Schedule(plan.numbers, plan.policy)
        self._ends: dict[int, CellEnd] = {}
        self._attempts: dict[int, int] = {}
        self._deadline_s = None if plan.deadline_s is None else time.monotonic() + plan.deadline_s

    def run(self) -> JobEnd:
        with ThreadPoolExecutor(self._plan.jobs, thread_name_prefix="cell") as pool:
            futures: dict[Future[CellEnd], int] = {}
            try:
                while not self._schedule.is_over:
                    self._fill(pool, futures)
                    self._await_some(futures)
            except BaseException:
                for future in futures:
                    future.cancel()
                # Not wait(futures): a signal may have come between the start of a cell and its entry there.
                self._run.end_all()
                raise
        names = [cell.name for cell in self._plan.matrix.cells]
        return JobEnd(
            tuple(
                result for number in self._plan.numbers if number in self._ends for result in self._ends[number].results
            ),
            tuple(names[number] for number in sorted(self._schedule.dropped)),
            self._schedule.stopped,
        )

    def _fill(self, pool: ThreadPoolExecutor, futures: dict[Future[CellEnd], int]) -> None:
        while len(futures) < self._plan.jobs and (number := self._schedule.take()) is not None:
            attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
            futures[pool.submit(self._run_cell, number, attempt)] = number

    def _await_some(self, futures: dict[Future[CellEnd], int]) -> None:
        left_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        done, _ = wait(futures, left_s, FIRST_COMPLETED)
        if not done:
            self._schedule.stop(DEADLINE)
            self._deadline_s = None
            self._run.end_all(DEADLINE, CellFault.TIME)
        for future in done:
            number = futures.pop(future)
            self._take(number, future.result())

    def _take(self, number: int, end: CellEnd) -> None:
        is_repeated = self._schedule.finish(number, end.fault)
        if not is_repeated:
            self._ends[number] = end
        self._watch(CellEnd(number, end.cell, end.results, end.attempt, end.seconds, end.is_kept, is_repeated))

    def _run_cell(self, number: int, attempt: int) -> CellEnd:
        cell, started_s = self._plan.matrix.cells[number], time.monotonic()
        if self._plan.results is None:
            results = self._run.run_cell(cell)
            return CellEnd(number, cell, tuple(results), attempt, time.monotonic() - started_s)
        content = "" if self._plan.found is None else find_content(self._plan.found, cell)
        with open_cell(self._plan.results, number) as folder:
            previous = folder.previous
            if previous is not None:
                self._check_same(previous, number)
            # A kernel that was built again may give another result under its old name.
            if previous is not None and previous.is_decided and previous.content == content:
                return CellEnd(
                    number, cell, tuple(read_results(cell, previous)), previous.attempt, previous.seconds, is_kept=True
                )
            return self._run_kept(number, content, folder, started_s)

    def _check_same(self, previous: CellRecord, number: int) -> None:
        """Two jobs of different matrices may have begun in one empty folder. Raises ConfigError."""
        found = previous.matrix, previous.number, previous.cell
        if found != (self._digest, number, self._plan.matrix.cells[number].name):
            assert self._plan.results is not None
            raise ConfigError(
                f"{self._plan.results / name_folder(number)} has the result of a cell of another matrix",
                hint="write into another directory: --to DIR",
            )

    def _run_kept(self, number: int, content: str, folder: CellFolder, started_s: float) -> CellEnd:
        cell = self._plan.matrix.cells[number]
        folder.begin(make_record(self._plan.matrix, number, content))
        results = self._run.run_cell(cell, folder)
        seconds = time.monotonic() - started_s
        # A cell that this run has cut stays as one that a kill has ended.
        if not any(map(self._run.is_cut, results)):
            folder.end(seconds)
        return CellEnd(number, cell, tuple(results), folder.attempt, seconds)


def make_record(matrix: Matrix, number: int, content: str = "") -> CellRecord:
    """Returns the record of a cell that begins now, on this host."""
    cell = matrix.cells[number]
    return CellRecord(
        matrix=matrix.digest,
        number=number,
        cell=cell.name,
        image=cell.image_name,
        kernel="own" if cell.kernel is None else cell.kernel.name,
        backend=cell.backend,
        architecture=cell.architecture,
        planned=tuple(command.name for command in cell.commands),
        vmkit=__version__,
        host=platform.node(),
        started=time.time(),
        content=content,
    )


def read_results(cell: Cell, record: CellRecord) -> Iterator[CellResult]:
    """Yields the results that a record has of a cell, for each command of it."""
    known = {command.name: command for command in record.commands}
    for command in cell.commands:
        one = known.get(command.name)
        if one is None:
            yield CellResult(cell, command, CaseVerdict.ERROR, 0.0, NOT_RUN, fault=CellFault.MACHINE)
        else:
            yield CellResult(cell, command, one.verdict, one.seconds, one.brief, one.text, one.tests, one.fault)
