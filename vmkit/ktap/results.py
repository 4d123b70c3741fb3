"""What a reader of KTAP gives: one result for each test that has no subtests, and for each that is missing. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmkit.junit import Case, CaseVerdict
from vsh.text import MAX_LINE_CHARACTERS, clean_line, clean_text

# A person reads some of these; JUnit has them all.
MAX_SHOWN = 100
BAD = frozenset((CaseVerdict.FAILED, CaseVerdict.ERROR))
# Between the names of a path.
SHOWN_NAME = " / "


@dataclass(frozen=True, slots=True)
class KtapResult:
    """The result of one test. path: the names of the tests around it, from the outermost, and its own.

    brief: why it did not pass. log: what was printed since the test before, its end if it was long. Both are as the
    guest wrote them, and may steer a terminal.
    """

    path: tuple[str, ...]
    verdict: CaseVerdict
    brief: str
    log: str

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD


def make_case(result: KtapResult, group: str) -> Case:
    """Returns a case for JUnit. group: the first word of its classname."""
    names = [_clean(name) for name in result.path]
    # Readers of JUnit take a dot for the next folder.
    classname = ".".join([group, *(name.replace(".", "_") for name in names[:-1])])
    return Case(classname, names[-1], result.verdict, _clean(result.brief), result.log and clean_text(result.log))


def _clean(text: str) -> str:
    # Most names are plain, and clean_line takes ten times as long to find that out.
    return text if text.isascii() and text.isprintable() and len(text) <= MAX_LINE_CHARACTERS else clean_line(text)


def count_results(results: Iterable[KtapResult]) -> str:
    """Returns one line: how many tests there are, and what became of them."""
    found = Counter(result.verdict for result in results)
    words = {CaseVerdict.ERROR: "errors" if found[CaseVerdict.ERROR] != 1 else "error"}
    parts = [f"{found[verdict]} {words.get(verdict, verdict.value)}" for verdict in CaseVerdict if found[verdict]]
    return f"{found.total()} {'test' if found.total() == 1 else 'tests'}: {', '.join(parts) or 'none'}"


def render_bad(results: Iterable[KtapResult]) -> Iterator[str]:
    """Yields a line for each test that failed or is missing, MAX_SHOWN at most."""
    bad = [result for result in results if result.is_bad]
    for result in bad[:MAX_SHOWN]:
        name = SHOWN_NAME.join(clean_line(name) for name in result.path)
        yield f"{result.verdict}: {name}" + (f": {clean_line(result.brief)}" if result.brief else "")
    if len(bad) > MAX_SHOWN:
        yield f"and {len(bad) - MAX_SHOWN} more"
