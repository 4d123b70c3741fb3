"""The suite's own end: what was tried and what got through, in the summary of the run."""

import pytest

from tests.guest.wall.ledger import LEDGER


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = LEDGER.render()
    if lines:
        terminalreporter.section("the wall: attempts and intrusions")
        for line in lines:
            terminalreporter.line(line)
