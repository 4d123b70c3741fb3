"""A fixed number of fuzz cases of the kernel log's reader, with every run of the tests."""

from tests.fuzz.fuzz_kernel_log import run_seeded
from tests.fuzz.seeded import count_good


def test_any_memory_is_survived() -> None:
    assert count_good(run_seeded, 300, 0) > 100
