"""A fixed number of fuzz cases of the 9P server of shared folders, with every run of the tests."""

from tests.fuzz.fuzz_9p import run_seeded
from tests.fuzz.seeded import count_good


def test_any_guest_is_survived() -> None:
    assert count_good(run_seeded, 200, 0) > 50
