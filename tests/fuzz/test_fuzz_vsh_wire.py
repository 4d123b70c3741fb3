"""A fixed number of fuzz cases of vsh and vshd, with every run of the tests."""

import pytest

from tests.fuzz.fuzz_vsh_wire import TARGETS, run_cases

CASES = {
    "codec": 1500,
    "frames": 1000,
    "server": 600,
    "client": 600,
    "duo": 60,
    "flags": 1500,
    "config": 300,
    "connect": 300,
    "forwards": 3000,
}
LIVE_CASES = 60


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_survived(name: str) -> None:
    run_cases(name, CASES[name], 0)


def test_live_daemon_survives_any_bytes() -> None:
    run_cases("live", LIVE_CASES, 0)
