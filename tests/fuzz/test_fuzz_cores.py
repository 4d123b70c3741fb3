"""A fixed number of fuzz cases of core dumps, with every run of the tests."""

from tests.fuzz.fuzz_cores import run_seeded
from tests.fuzz.seeded import count_good


def test_any_stream_of_cores_is_survived() -> None:
    assert count_good(run_seeded, 1500, 0) > 300
