"""A fixed number of fuzz cases of maitred's messages, with every run of the tests."""

from tests.fuzz.fuzz_maitred import run_seeded
from tests.fuzz.seeded import count_good


def test_any_bytes_are_a_message_or_refused() -> None:
    assert count_good(run_seeded, 3000, 0) > 300
