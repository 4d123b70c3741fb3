"""JUnit's XML, as CI systems read it: one suite of cases, of any text. Pure, and knows no machine."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from xml.etree import ElementTree as Xml

# Characters that XML 1.0 cannot hold (section 2.2, Char).
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
    """Returns one suite with the cases. What XML cannot hold becomes U+FFFD."""
    root = Xml.Element("testsuites")
    element = Xml.SubElement(root, "testsuite", name=_clean(suite))
    found = Counter(_add_case(element, case) for case in cases)
    element.set("tests", str(found.total()))
    for verdict, name in _COUNTS.items():
        element.set(name, str(found[verdict]))
    Xml.indent(root)
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True))


def _add_case(suite: Xml.Element, case: Case) -> CaseVerdict:
    element = Xml.SubElement(suite, "testcase", classname=_clean(case.classname), name=_clean(case.name))
    if case.seconds is not None:
        element.set("time", f"{case.seconds:.3f}")
    name = _ELEMENTS.get(case.verdict)
    if name is not None:
        Xml.SubElement(element, name, message=_clean(case.brief)).text = _clean(case.text)
    elif case.text:
        Xml.SubElement(element, "system-out").text = _clean(case.text)
    return case.verdict


def _clean(text: str) -> str:
    return text if text.isascii() and text.isprintable() else _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
