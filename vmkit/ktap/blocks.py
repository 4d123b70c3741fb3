"""One block of tests: a version line, a plan and results, all of one indentation. And the limits of an output. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vmkit.junit import CaseVerdict
from vmkit.ktap.lines import measure
from vmkit.ktap.results import KtapResult

# The kernel's own tests have three levels, in kselftest's runner one more.
MAX_DEPTH = 32
# Of what a test prints, the end is kept; of a test that passed, less.
MAX_LOG_CHARACTERS = 64 * 1024
MAX_PASSED_LOG_CHARACTERS = 4 * 1024
# Of a whole output. A result without a log is still a result.
MAX_LOGS_CHARACTERS = 32 * 1024 * 1024
MAX_TESTS = 250_000
# A plan may promise any number: so many of the missing have a result each, and the others one together.
MAX_MISSING = 1000
MAX_NAME_CHARACTERS = 1024


class Allowance:
    """What all blocks of one output share: the room that is left."""

    def __init__(self, tests: int, log_characters: int) -> None:
        self.tests_left = tests
        self.log_left = log_characters
        self.is_full = False

    def take_test(self) -> bool:
        """Counts a test. Returns False when there are too many."""
        self.tests_left -= 1
        self.is_full = self.is_full or self.tests_left < 0
        return not self.is_full

    def take_log(self, pieces: Sequence[str], limit: int) -> str:
        """Returns the end of a log, in whole lines where it has any."""
        text = "\n".join(pieces)
        limit = min(limit, self.log_left)
        if len(text) > limit:
            text = text[len(text) - limit :]
            text = text[text.find("\n") + 1 :]
        self.log_left -= len(text)
        return text


@dataclass(slots=True)
class Leaf:
    """A result before the tests around it have names. parents: from the innermost."""

    name: str
    verdict: CaseVerdict
    brief: str
    log: str
    parents: list[str] = field(default_factory=list)

    def seal(self) -> KtapResult:
        path = (*reversed(self.parents), self.name) if self.parents else (self.name,)
        return KtapResult(path, self.verdict, self.brief, self.log)


class Block:
    """One level of tests. Invariant: `seen` has the numbers of its results, and `reported` their count; `subtests` are
    those of the test that runs.
    """

    def __init__(self, indent: str, *, is_declared: bool, is_tap: bool) -> None:
        """is_declared: by a version line. is_tap: a result may have no number."""
        self.indent = indent
        self.width = measure(indent)
        self.is_declared = is_declared
        self.is_tap = is_tap
        self.name = ""
        self.plan: int | None = None
        self.skipped: str | None = None
        self.seen: set[int] = set()
        self.reported = 0
        self.last = 0
        self.leaves: list[Leaf] = []
        self.has_bad = False
        # Whether a test of this very block has reported.
        self.has_own = False
        self.bail_out: str | None = None
        # Of the test that runs: its name, its subtests, the name of their block, and the panic that came meanwhile.
        self.started = ""
        self.subtests: list[Leaf] = []
        self.has_child = False
        self.child_name = ""
        self.panic: str | None = None
        # The panic that ended one of its subtests.
        self.cause = ""
        self.log: list[str] = []
        self._log_size = 0

    @property
    def next_name(self) -> str:
        """The test that runs, as far as it has a name."""
        return self.child_name or self.started or f"test {self.last + 1}"

    @property
    def left(self) -> int:
        """How many tests are planned and not reported."""
        return 0 if self.plan is None else max(0, self.plan - self.reported)

    @property
    def is_unused(self) -> bool:
        """Whether nothing has reported in it."""
        return not self.reported and not self.has_child

    def keep(self, text: str) -> None:
        """Adds a line to the log of the test that runs."""
        self.log.append(text)
        self._log_size += len(text) + 1
        if self._log_size > 2 * MAX_LOG_CHARACTERS:
            # Seldom: half of it goes at once.
            kept = 0
            first = len(self.log)
            while first and kept + len(self.log[first - 1]) < MAX_LOG_CHARACTERS:
                first -= 1
                kept += len(self.log[first]) + 1
            del self.log[:first]
            self._log_size = kept

    def take_log(self) -> list[str]:
        log, self.log, self._log_size = self.log, [], 0
        return log

    def count(self, number: int) -> None:
        """Notes that a test has reported, or will not."""
        if len(self.seen) < MAX_TESTS:
            self.seen.add(number)
        self.reported += 1
        self.last = number
        self.started = self.child_name = self.cause = ""
        self.subtests = []
        self.has_child = False

    def find_missing(self) -> Iterator[tuple[int, int]]:
        """Yields the numbers that are planned and not reported, as first and last of each run.

        Where numbers came twice, others seem to be missing: then the last of these count.
        """
        if not self.left:
            return
        assert self.plan is not None
        top = max((number for number in self.seen if number <= self.plan), default=0)
        behind = self.plan - top
        in_gaps = max(0, self.left - behind)
        if in_gaps:
            gaps: list[int] = []
            number = top
            while len(gaps) < min(in_gaps, MAX_MISSING):
                if number not in self.seen:
                    gaps.append(number)
                number -= 1
            yield from ((number, number) for number in reversed(gaps))
        if self.left > in_gaps:
            yield self.plan - (self.left - in_gaps) + 1, self.plan
