"""A fixed number of fuzz cases of the notes of core dumps, with every run of the tests."""

from tests.fuzz.fuzz_notes import run_seeded
from tests.fuzz.seeded import count_good


def test_any_core_is_survived() -> None:
    assert count_good(run_seeded, 1500, 0) > 300
