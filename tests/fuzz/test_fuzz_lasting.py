"""A fixed number of fuzz cases of lasting sessions, with every run of the tests."""

from tests.fuzz.fuzz_lasting import run_seeded
from tests.fuzz.seeded import count_good


def test_any_list_and_any_call_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 500
