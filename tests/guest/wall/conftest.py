"""The suite's own end: what was tried and what got through, in the summary of the run."""

from pathlib import Path

import pytest

from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import FULL_TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = LEDGER.render()
    if lines:
        terminalreporter.section("the wall: attempts and intrusions")
        for line in lines:
            terminalreporter.line(line)
    # A run that failed proves nothing that a table should say.
    if lines and FULL_TABLE and not terminalreporter.stats.get("failed") and not terminalreporter.stats.get("error"):
        page = Path(FULL_TABLE)
        if page.exists():
            LEDGER.read_table(page.read_text())
        page.write_text(LEDGER.render_table())
