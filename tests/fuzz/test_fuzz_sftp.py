"""A fixed number of fuzz cases of vshd's SFTP, with every run of the tests."""

from tests.fuzz.fuzz_sftp import run_seeded
from tests.fuzz.seeded import count_good


def test_any_client_is_survived() -> None:
    assert count_good(run_seeded, 200, 0) > 50
