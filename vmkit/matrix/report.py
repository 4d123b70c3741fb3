"""Renders results: JUnit's XML for CI, rows for a table, and the cells for GitHub Actions. Pure."""

import json
import re
from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from vmkit.matrix.execute import CellResult, CellVerdict
from vmkit.matrix.plan import Cell

COLUMNS = ("IMAGE", "KERNEL", "BACKEND", "COMMAND", "RESULT", "SECONDS")
# Characters that XML 1.0 cannot hold (section 2.2, Char).
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ELEMENTS = {CellVerdict.FAILED: "failure", CellVerdict.ERROR: "error", CellVerdict.SKIPPED: "skipped"}


def render_junit(outcomes: Sequence[CellResult]) -> bytes:
    """Returns one suite with a case for each command of each cell. Its classname is the cell."""
    counts = {f"{name}s" if name != "skipped" else name: 0 for name in _ELEMENTS.values()}
    suite = Xml.Element("testsuite", name="vmkit matrix", tests=str(len(outcomes)))
    for outcome in outcomes:
        case = Xml.SubElement(
            suite,
            "testcase",
            classname=outcome.cell.name.replace("/", "."),
            name=outcome.command.name,
            time=f"{outcome.seconds:.3f}",
        )
        element = _ELEMENTS.get(outcome.verdict)
        if element is None:
            Xml.SubElement(case, "system-out").text = _clean(outcome.text)
            continue
        counts[f"{element}s" if element != "skipped" else element] += 1
        Xml.SubElement(case, element, message=_clean(outcome.brief)).text = _clean(outcome.text)
    for name, count in counts.items():
        suite.set(name, str(count))
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True))


def render_rows(outcomes: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """Returns a row for each result, for COLUMNS."""
    return [
        (
            outcome.cell.image,
            "own" if outcome.cell.kernel is None else outcome.cell.kernel.name,
            outcome.cell.backend,
            outcome.command.name,
            outcome.verdict if outcome.verdict is CellVerdict.PASSED else f"{outcome.verdict}: {outcome.brief}",
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
    ]


def render_github(cells: Sequence[Cell]) -> str:
    """Returns a line for $GITHUB_OUTPUT: the value of a job's strategy.matrix, with an entry for each cell."""
    return "matrix=" + json.dumps({"include": [{"cell": cell.name} for cell in cells]})


def _clean(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
