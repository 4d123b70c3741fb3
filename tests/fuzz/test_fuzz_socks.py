"""A fixed number of fuzz cases of the server's side of SOCKS 5, with every run of the tests."""

from tests.fuzz.fuzz_socks import run_seeded
from tests.fuzz.seeded import count_good


def test_any_client_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 200
