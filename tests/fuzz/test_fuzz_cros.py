"""A fixed number of fuzz cases of what a guest sends by LogCollector, with every run of the tests."""

from tests.fuzz.fuzz_cros import run_seeded
from tests.fuzz.seeded import count_good


def test_any_request_of_a_guest_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 500
