"""A fixed number of fuzz cases of the reading of listening ports, with every run of the tests."""

from tests.fuzz.fuzz_ports import run_seeded
from tests.fuzz.seeded import count_good


def test_any_report_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 500
