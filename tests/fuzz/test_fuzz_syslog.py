"""A fixed number of fuzz cases of the reading of a guest's log, with every run of the tests."""

from tests.fuzz.fuzz_syslog import run_seeded
from tests.fuzz.seeded import count_good


def test_any_log_of_a_guest_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 500
