"""A fixed number of fuzz cases of the users' files, with every run of the tests."""

from tests.fuzz.fuzz_users import run_seeded
from tests.fuzz.seeded import count_good


def test_any_file_of_users_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 100
