"""The race's programs: each is waited for, and what goes wrong with it is told."""

import pytest

from vmkit.bench.programs import time_program
from vmkit.errors import CommandError


def test_program_that_does_not_end_is_killed_and_told() -> None:
    with pytest.raises(CommandError, match=r"did not end within 0\.1 s"):
        time_program(["sleep", "100"], deadline_s=0.1)


def test_program_that_fails_says_so() -> None:
    with pytest.raises(CommandError, match="failed with status 3") as caught:
        time_program(["sh", "-c", "echo why >&2; exit 3"])
    assert "why" in caught.value.details
