"""JUnit's XML, as CI systems read it: one suite of cases, of any text. Pure, and knows no machine."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from xml.sax.saxutils import escape, quoteattr

# Characters that XML 1.0 cannot hold (section 2.2, Char).
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\r")
# Most texts: no character of theirs means anything in XML.
_PLAIN = re.compile(r"[ !#-%'-;=?-~]*")


class CaseVerdict(StrEnum):
    """passed; failed: it ran, and said so; error: it has no result of its own; skipped: it cannot run here."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    SKIPPED = "skipped"


_ELEMENTS = {CaseVerdict.FAILED: "failure", CaseVerdict.ERROR: "error", CaseVerdict.SKIPPED: "skipped"}
# The suite's attributes.
_COUNTS = {CaseVerdict.FAILED: "failures", CaseVerdict.ERROR: "errors", CaseVerdict.SKIPPED: "skipped"}


@dataclass(frozen=True, slots=True)
class Case:
    """One test. brief: why it did not pass, in a line. text: its output. seconds: None where it is unknown."""

    classname: str
    name: str
    verdict: CaseVerdict
    brief: str = ""
    text: str = ""
    seconds: float | None = None


def render_junit(suite: str, cases: Iterable[Case]) -> bytes:
    """Returns one suite with the cases. What XML cannot hold becomes U+FFFD.

    It is written by hand: xml.etree takes three times as long for 100,000 cases.
    """
    found: Counter[CaseVerdict] = Counter()
    lines = []
    for case in cases:
        found[case.verdict] += 1
        lines.append(render_junit_case(case))
    return (render_junit_head(suite, found) + "\n".join([*lines, render_junit_end()])).encode()


def render_junit_head(suite: str, counts: Mapping[CaseVerdict, int]) -> str:
    """Returns what comes before the cases, for a report that is written case by case. counts: by their verdicts."""
    values = {"tests": sum(counts.values()), **{name: counts.get(verdict, 0) for verdict, name in _COUNTS.items()}}
    start = "".join(f' {name}="{count}"' for name, count in values.items())
    return f"<?xml version='1.0' encoding='utf-8'?>\n<testsuites>\n  <testsuite name={_quote(suite)}{start}>\n"


def render_junit_end() -> str:
    """Returns what comes behind the cases."""
    return "  </testsuite>\n</testsuites>\n"


def render_junit_case(case: Case) -> str:
    """Returns the lines of one case, without the last line's end."""
    seconds = "" if case.seconds is None else f' time="{case.seconds:.3f}"'
    start = f"    <testcase classname={_quote(case.classname)} name={_quote(case.name)}{seconds}"
    name = _ELEMENTS.get(case.verdict)
    if name is not None:
        return f"{start}>\n{_render_element(name, f' message={_quote(case.brief)}', case.text)}\n    </testcase>"
    if case.text:
        return f"{start}>\n{_render_element('system-out', '', case.text)}\n    </testcase>"
    return f"{start}/>"


def _render_element(name: str, attributes: str, text: str) -> str:
    if not text:
        return f"      <{name}{attributes}/>"
    return f"      <{name}{attributes}>{text if _PLAIN.fullmatch(text) else escape(_clean(text))}</{name}>"


def _quote(text: str) -> str:
    return f'"{text}"' if _PLAIN.fullmatch(text) else quoteattr(_clean(text))


def _clean(text: str) -> str:
    # Most texts are ASCII, and this finds out ten times as quickly that nothing is to be replaced.
    if text.isascii():
        data = text.encode()
        if len(data.translate(None, _CONTROLS)) == len(data):
            return text
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
