"""Makes one result of the records of many cells, wherever they ran. Pure.

Each cell of the plan is in the result once: with the record that decides it, or as missing. A cell that ran twice has
the worse of two results, so that no failure is lost. Clocks of nodes differ: nothing depends on them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vmkit.junit import Case, CaseVerdict
from vmkit.matrix.report import make_classname
from vmkit.matrix.results import NOT_RUN, STATUSES, CellFault, CellRecord, CommandRecord, PlanRecord, pick_fault

MISSING = "missing"
# In the order in which reports count them.
VERDICTS = ("passed", "failed", "timed out", "machine failed", "killed", MISSING, "skipped")
GOOD = ("passed", "skipped")
_WORST_FIRST = list(STATUSES)


@dataclass(frozen=True, slots=True)
class Found:
    """A record that a merge found, without its texts. place: its folder. cases: of its JUnit file, by their verdicts.

    whole: the record with its texts, where there is room for it.
    """

    record: CellRecord
    place: str
    cases: Mapping[CaseVerdict, int]
    whole: CellRecord | None = None


@dataclass(frozen=True, slots=True)
class MergedCell:
    """A cell of the plan. found: None if it is missing. others: folders of its other results, which do not count.
    brief: why it did not pass.
    """

    number: int
    name: str
    commands: tuple[str, ...]
    found: Found | None = None
    others: tuple[str, ...] = ()
    # Those of the record, found once: reports ask for them again and again.
    verdict: str = MISSING
    fault: CellFault = CellFault.MACHINE
    brief: str = "no directory has results of it"

    @property
    def seconds(self) -> float:
        return 0.0 if self.found is None else self.found.record.seconds

    @property
    def retries(self) -> int:
        return 0 if self.found is None else len(self.found.record.earlier)

    @property
    def group(self) -> tuple[str, str]:
        """Its image and kernel, by its name: they are known of a missing cell, too."""
        image, kernel, *_ = (*self.name.split("/"), "")
        return image, kernel


@dataclass(frozen=True, slots=True)
class CellChange:
    """A cell whose verdict is another than in the run before. before, after: None where it was or is no cell."""

    cell: str
    before: str | None
    after: str | None

    @property
    def is_worse(self) -> bool:
        return self.after is not None and self.after not in GOOD


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a matrix. troubles: what could not be read. changes: since another run; None: none was given."""

    plan: PlanRecord
    cells: tuple[MergedCell, ...]
    troubles: tuple[str, ...] = ()
    changes: tuple[CellChange, ...] | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """How many cells have each verdict, in the order of VERDICTS."""
        found = Counter(cell.verdict for cell in self.cells)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    @property
    def fault(self) -> CellFault:
        return pick_fault(cell.fault for cell in self.cells)

    @property
    def bad(self) -> list[MergedCell]:
        """Cells that did not pass."""
        return [cell for cell in self.cells if cell.verdict not in GOOD]

    @property
    def cases(self) -> Counter[CaseVerdict]:
        """The cases of the JUnit file, by their verdicts."""
        total: Counter[CaseVerdict] = Counter()
        for cell in self.cells:
            total.update({CaseVerdict.ERROR: len(cell.commands)} if cell.found is None else cell.found.cases)
        return total


def merge_records(plan: PlanRecord, found: Iterable[Found], troubles: Mapping[int, str]) -> Merged:
    """Merges what was found. troubles: of records that cannot be read, by the number of their cell."""
    candidates: dict[int, list[Found]] = {}
    wrong = dict(troubles)
    for one in found:
        number = one.record.number
        if (
            one.record.matrix != plan.matrix
            or not 0 <= number < len(plan.cells)
            or (plan.cells[number] != one.record.cell)
            or set(plan.list_commands(one.record.cell)) != set(one.record.planned)
        ):
            wrong.setdefault(number, f"{one.place} has a result of another matrix")
            continue
        candidates.setdefault(number, []).append(one)
    return Merged(
        plan,
        tuple(
            _merge_cell(MergedCell(number, name, plan.list_commands(name)), candidates.get(number, ()), wrong)
            for number, name in enumerate(plan.cells)
        ),
        tuple(wrong[number] for number in sorted(wrong)),
    )


def _merge_cell(cell: MergedCell, candidates: Sequence[Found], troubles: Mapping[int, str]) -> MergedCell:
    if not candidates:
        return replace(cell, brief=troubles.get(cell.number, cell.brief))
    best, *others = sorted(candidates, key=_rank) if len(candidates) > 1 else candidates
    record = best.record
    return MergedCell(
        cell.number,
        cell.name,
        cell.commands,
        best,
        tuple(one.place for one in others),
        record.verdict,
        record.fault,
        record.brief,
    )


def _rank(found: Found) -> tuple[object, ...]:
    """The record that decides comes first: a decided one, the worse one, the later attempt."""
    record = found.record
    fault = _WORST_FIRST.index(record.fault) if record.is_decided else 0
    return not record.is_decided, not record.is_ended, fault, -record.attempt, -len(record.commands), found.place


def count_cases(record: CellRecord) -> Counter[CaseVerdict]:
    """Counts the cases that the JUnit file has of a cell, by their verdicts."""
    found = Counter(command.verdict for command in record.commands)
    found.update(test.verdict for command in record.commands for test in command.tests)
    known = {command.name for command in record.commands}
    found[CaseVerdict.ERROR] += sum(name not in known for name in record.planned)
    return found


def strip_record(record: CellRecord) -> CellRecord:
    """Returns a record without its texts: of 10,000 cells they do not fit into memory."""
    commands = (CommandRecord(one.name, one.verdict, one.fault, one.seconds, one.brief) for one in record.commands)
    return replace(record, commands=tuple(commands))


def make_missing_cases(cell: MergedCell) -> Iterator[Case]:
    """Returns the cases of a cell without results: an error for each command."""
    for name in cell.commands:
        yield Case(make_classname(cell.name), name, CaseVerdict.ERROR, f"{NOT_RUN}: {cell.brief}")


def compare(before: Mapping[str, str], cells: Iterable[MergedCell]) -> tuple[CellChange, ...]:
    """Returns the cells whose verdict is another one. before: the verdicts of the run before, by the cells' names."""
    after = {cell.name: cell.verdict for cell in cells}
    changes = [
        CellChange(name, before.get(name), verdict) for name, verdict in after.items() if before.get(name) != verdict
    ]
    gone = [CellChange(name, verdict, None) for name, verdict in before.items() if name not in after]
    return tuple(sorted(changes, key=lambda change: not change.is_worse) + gone)
