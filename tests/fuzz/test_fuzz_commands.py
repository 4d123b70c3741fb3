"""A fixed number of fuzz cases of vsock_guest_exec's commands, with every run of the tests."""

from tests.fuzz.fuzz_commands import run_seeded
from tests.fuzz.seeded import count_good


def test_any_bytes_of_a_host_are_survived() -> None:
    assert count_good(run_seeded, 500, 0) > 100
