"""The form of one line of KTAP: what stands before it, and what kind of line it is. Pure, and keeps no state.

Documentation/dev-tools/ktap.rst of the kernel has the forms. Before a line may stand what a kernel's log, `dmesg`, the
journal or a CI system puts there. Its indentation follows: blanks, or one `# ` for each runner of kselftest around it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vmkit.junit import CaseVerdict

# linux/printk.h: what dmesg, the journal and CI logs have before a line, each with the one blank behind it.
_CLOCK = r"\d\d:\d\d:\d\d(?:[.,]\d{1,9})?"
_DATED = rf"(?:\d{{4}}-\d\d-\d\dT{_CLOCK}(?:Z|[+-]\d\d:?\d\d)|[A-Z][a-z][a-z] [ \d]\d {_CLOCK}) "
_STAMP = r"\[ *\d{1,12}\.\d{1,9}(?: <[ \d.+]{1,24}>)?\](?:\[ *[TC]\d{1,10}\])?(?: |$)"
_DATE = rf"\[[A-Z][a-z][a-z] [A-Z][a-z][a-z] [ \d]\d {_CLOCK} \d{{4}}\](?: |$)"
_BEFORE = re.compile(
    rf"(?:{_DATED}(?:[^\s:]{{1,64}} (?P<journal>kernel): )?)?"
    rf"(?P<kernel>(?:[a-z0-9]{{1,8}} *:[a-z]{{3,6}} *: )?(?:<\d{{1,4}}>)?(?:{_STAMP}|{_DATE})|<\d{{1,4}}>)?"
)
# The most frequent of them.
_STAMPED = re.compile(r"\[ *\d{1,12}\.\d{1,9}\] ")
# The first letters of what _BEFORE matches; other lines begin at once.
_MAY_BE_BEFORE = frozenset("<[0123456789JFMASONDkudlscna")
_OUTCOME = re.compile(r"(?P<not>not )?ok(?:\s+(?P<number>\d{1,9})(?=[\s-]|$))?(?:\s+(?:-\s+)?|-\s+|$)(?P<rest>.*)")
_PLAN = re.compile(r"1\.\.(?P<count>\d{1,9})(?:\s*#\s*(?i:skip)\w*:?\s*(?P<reason>.*))?\s*")
_VERSION = re.compile(r"(?P<kind>K?TAP) version \d{1,4}\s*")
# SKIP and TODO are TAP's, which does not care for their case.
_DIRECTIVE = re.compile(r"(?:^|\s)#\s*(?P<word>(?i:skip)\w*|(?i:todo)\b|XFAIL\b|TIMEOUT\b|ERROR\b):?\s*(?P<reason>.*)")
_REMARK = re.compile(r"(?:^|\s+)#\s+(?P<remark>.*)")
# What kselftest prints before a program, and its harness before a test.
_HEADING = re.compile(r"selftests: \S+: \S+")
_RUN = re.compile(r"RUN +(?P<name>\S.*?) \.\.\.")
_SUBTEST = re.compile(r"Subtest: *(?P<name>.*\S)")
_PANIC = "Kernel panic - not syncing: "
_BAIL_OUT = "Bail out!"
_BANNER = "Linux version "
_ZERO = re.compile(r"\[ *0\.0+\]")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

TAB = "    "


@dataclass(frozen=True, slots=True)
class VersionLine:
    """The start of a block of tests. is_tap: of TAP, where a result may have no number."""

    is_tap: bool


@dataclass(frozen=True, slots=True)
class PlanLine:
    """How many tests the block has. skipped: why it has none, in TAP's `1..0 # SKIP reason`; None without that."""

    count: int
    skipped: str | None


class ResultLine(NamedTuple):
    """The result of one test. number: None where the line has none. brief: why it did not pass, or what was said.

    A tuple, as Line: each line makes some, and a frozen dataclass takes three times as long.
    """

    number: int | None
    name: str
    verdict: CaseVerdict
    brief: str


@dataclass(frozen=True, slots=True)
class SubtestLine:
    """The name of a block: of this one, or of one that follows."""

    name: str


@dataclass(frozen=True, slots=True)
class StartLine:
    """The name of the test that runs now."""

    name: str


@dataclass(frozen=True, slots=True)
class BailOutLine:
    """The tests of this block end here."""

    reason: str


@dataclass(frozen=True, slots=True)
class PanicLine:
    """The kernel ends here."""

    reason: str


@dataclass(frozen=True, slots=True)
class BootLine:
    """A kernel starts here."""


Kind = VersionLine | PlanLine | ResultLine | SubtestLine | StartLine | BailOutLine | PanicLine | BootLine


class Line(NamedTuple):
    """One line. indent: the blanks and `# ` before its words. kind: None for a line of no form."""

    text: str
    is_kernel: bool
    indent: str
    kind: Kind | None


def parse_line(text: str) -> Line:
    """Returns the parts of a line without its end. is_kernel: it came through the kernel's log."""
    body = _CONTROL.sub("", text) if "\x1b" in text else text
    stamp = ""
    is_kernel = False
    if body[:1] in _MAY_BE_BEFORE:
        found = _STAMPED.match(body)
        if found is not None:
            stamp, is_kernel = found[0], True
        else:
            found = _BEFORE.match(body)
            # It matches the empty text.
            assert found is not None
            stamp = found["kernel"] or ""
            is_kernel = bool(stamp or found["journal"])
        body = body[found.end() :]
    words = body.lstrip("# \t")
    indent = body[: len(body) - len(words)]
    finder = _FINDERS.get(words[:1])
    return Line(text, is_kernel, indent, None if finder is None else finder(words, indent, stamp))


def _find_outcome(words: str, _indent: str, _stamp: str) -> Kind | None:
    found = _OUTCOME.fullmatch(words)
    return None if found is None else _parse_outcome(found)


def _find_plan(words: str, _indent: str, _stamp: str) -> Kind | None:
    found = _PLAN.fullmatch(words)
    return None if found is None else PlanLine(int(found["count"]), found["reason"])


def _find_version(words: str, indent: str, _stamp: str) -> Kind | None:
    found = _VERSION.fullmatch(words)
    if found is not None:
        return VersionLine(found["kind"] == "TAP")
    return PanicLine(words.removeprefix(_PANIC)) if words.startswith(_PANIC) and "#" not in indent else None


def _find_boot(words: str, _indent: str, stamp: str) -> Kind | None:
    return BootLine() if words.startswith(_BANNER) and _ZERO.search(stamp) else None


def _find_bail_out(words: str, _indent: str, _stamp: str) -> Kind | None:
    return BailOutLine(words.removeprefix(_BAIL_OUT).strip()) if words.startswith(_BAIL_OUT) else None


def _find_subtest(words: str, indent: str, _stamp: str) -> Kind | None:
    found = _SUBTEST.match(words)
    return None if found is None or "#" not in indent else SubtestLine(found["name"])


def _find_run(words: str, _indent: str, _stamp: str) -> Kind | None:
    found = _RUN.match(words)
    return None if found is None else StartLine(found["name"])


def _find_heading(words: str, indent: str, _stamp: str) -> Kind | None:
    return StartLine(words.rstrip()) if "#" in indent and _HEADING.match(words) else None


# By the first letter, as most lines of a log are of no form.
_FINDERS: dict[str, Callable[[str, str, str], Kind | None]] = {
    "o": _find_outcome,
    "n": _find_outcome,
    "1": _find_plan,
    "K": _find_version,
    "T": _find_version,
    "L": _find_boot,
    "B": _find_bail_out,
    "S": _find_subtest,
    "R": _find_run,
    "s": _find_heading,
}


def _parse_outcome(found: re.Match[str]) -> ResultLine:
    rest = found["rest"]
    number = None if found["number"] is None else int(found["number"])
    is_ok = found["not"] is None
    verdict = CaseVerdict.PASSED if is_ok else CaseVerdict.FAILED
    directive = _DIRECTIVE.search(rest) if "#" in rest else None
    if directive is None:
        remark = _REMARK.search(rest) if "#" in rest else None
        name, brief = (rest, "") if remark is None else (rest[: remark.start()], remark["remark"])
        return ResultLine(number, _clean_name(name), verdict, brief.strip())
    reason = directive["reason"].strip()
    match directive["word"].upper():
        case "XFAIL":
            verdict, brief = CaseVerdict.SKIPPED, _join("it failed as expected", reason)
        case "TODO":
            # TAP: one that passes all the same has passed.
            verdict = CaseVerdict.PASSED if is_ok else CaseVerdict.SKIPPED
            brief = reason if is_ok else _join("it failed as expected", reason)
        case "TIMEOUT":
            verdict, brief = CaseVerdict.FAILED, _join("it took too long", reason)
        case "ERROR":
            verdict, brief = CaseVerdict.ERROR, reason or "ERROR"
        case _:
            verdict, brief = CaseVerdict.SKIPPED, reason
    # kselftest has the name of a test that it skips behind the word.
    return ResultLine(number, _clean_name(rest[: directive.start()]) or reason, verdict, brief)


def _clean_name(name: str) -> str:
    return name.replace("\\#", "#").strip()


def _join(brief: str, reason: str) -> str:
    return f"{brief}: {reason}" if reason else brief


def measure(indent: str) -> int:
    """Returns the columns of an indentation. KUnit once had a tab for each level."""
    return len(indent.replace("\t", TAB)) if "\t" in indent else len(indent)
