"""A fixed number of fuzz cases of the reading of KTAP, with every run of the tests."""

from tests.fuzz.fuzz_ktap import run_seeded
from tests.fuzz.seeded import count_good


def test_any_output_is_survived() -> None:
    assert count_good(run_seeded, 500, 0) > 300
