"""A merged result in KCIDB's form, version 5.3 (kcidb-io), piece by piece: 10,000 cells never are in memory. Pure.

A kernel and an architecture are a build. A command, and each test in it, is a test of the build. What did not run is
MISS, a machine or a command that failed to give a result is ERROR.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from vmkit.junit import CaseVerdict
from vmkit.matrix.merge import Merged, MergedCell
from vmkit.matrix.results import CellFault, CellRecord, CommandRecord

VERSION = {"major": 5, "minor": 3}
DEFAULT_ORIGIN = "vmkit"
ORIGIN = re.compile(r"[a-z0-9_]+")
MAX_LOG_CHARACTERS = 16384
# What a step of a path cannot have.
_NO_STEP = re.compile(r"[^a-zA-Z0-9_-]+")
_STATUSES = {
    CaseVerdict.PASSED: "PASS",
    CaseVerdict.FAILED: "FAIL",
    CaseVerdict.ERROR: "ERROR",
    CaseVerdict.SKIPPED: "SKIP",
}


class KcidbReport:
    """The report of one run. origin: the name that KCIDB gave to the CI system of the sender."""

    def __init__(self, merged: Merged, origin: str) -> None:
        self._merged = merged
        self._origin = origin
        # Another run of the same matrix has other ids.
        starts = "".join(str(cell.found.record.started) for cell in merged.cells if cell.found is not None)
        self._run = hashlib.sha256(f"{merged.plan.matrix} {starts}".encode()).hexdigest()[:16]

    def render_head(self) -> Iterator[str]:
        """Yields all that comes before the tests."""
        checkout = {"id": self._name(), "origin": self._origin, "comment": "kernels of a vmkit matrix"}
        builds = {}
        for cell in self._merged.cells:
            kernel, architecture = _find_kernel(cell)
            builds[kernel, architecture] = {
                "id": self._name(kernel, architecture),
                "checkout_id": self._name(),
                "origin": self._origin,
                "comment": kernel,
                "architecture": architecture,
            }
        yield f'{{"version": {json.dumps(VERSION)},\n"checkouts": [{json.dumps(checkout)}],\n'
        yield f'"builds": {json.dumps(list(builds.values()))},\n"tests": [\n'

    def render_tests(self, cell: MergedCell, record: CellRecord | None) -> Iterator[str]:
        """Yields a JSON object for each test of a cell. record: whole, with its texts."""
        known = {} if record is None else {command.name: command for command in record.commands}
        for name in cell.commands:
            command = known.get(name)
            for test in [self._make_missing(cell, name)] if command is None else self._make(cell, record, command):
                yield json.dumps(test)

    def render_end(self) -> str:
        """Returns what closes the report. The caller puts a comma between two tests."""
        return "\n]}\n"

    def _make(self, cell: MergedCell, record: CellRecord | None, command: CommandRecord) -> Iterable[dict[str, Any]]:
        assert record is not None
        base = self._make_base(cell)
        started = datetime.fromtimestamp(record.started, UTC).isoformat()
        status = "MISS" if command.fault is CellFault.MACHINE else _STATUSES[command.verdict]
        yield {
            **base,
            "id": self._name(cell.name, command.name),
            "path": _make_path([command.name]),
            "status": status,
            "start_time": started,
            "duration": command.seconds,
            "log_excerpt": _excerpt(command.text or command.brief),
            "misc": {"cell": cell.name, "brief": command.brief, "machine": dict(record.machine or {})},
        }
        for number, test in enumerate(command.tests):
            yield {
                **base,
                # Two tests may have one name.
                "id": self._name(cell.name, command.name, str(number)),
                "path": _make_path([command.name, *test.path]),
                "status": _STATUSES[test.verdict],
                "start_time": started,
                "log_excerpt": _excerpt(test.log or test.brief),
                "misc": {"cell": cell.name},
            }

    def _make_missing(self, cell: MergedCell, name: str) -> dict[str, Any]:
        identity = {"id": self._name(cell.name, name), "path": _make_path([name]), "status": "MISS"}
        return {**self._make_base(cell), **identity, "misc": {"cell": cell.name, "brief": cell.brief}}

    def _make_base(self, cell: MergedCell) -> dict[str, Any]:
        return {"build_id": self._name(*_find_kernel(cell)), "origin": self._origin}

    def _name(self, *words: str) -> str:
        return f"{self._origin}:" + "/".join([self._run, *words]).replace("\0", "")


def _find_kernel(cell: MergedCell) -> tuple[str, str]:
    """A kernel of an image's own is named by the image. The name of a cell has an architecture that is not amd64."""
    image, kernel = cell.group
    words = cell.name.split("/")
    architecture = words[3] if len(words) > 3 and words[3] not in cell.commands else "amd64"
    if cell.found is not None:
        architecture = cell.found.record.architecture
    return (f"{image}'s own" if kernel == "own" else kernel), architecture


def _make_path(words: Iterable[str]) -> str:
    return ".".join(_NO_STEP.sub("_", word) or "_" for word in words)


def _excerpt(text: str) -> str:
    return text[-MAX_LOG_CHARACTERS:].replace("\0", "\N{REPLACEMENT CHARACTER}")
