"""A fixed number of fuzz cases of the BTF reader, with every run of the tests."""

from tests.fuzz.fuzz_btf import run_seeded
from tests.fuzz.seeded import count_good


def test_any_bytes_are_survived() -> None:
    assert count_good(run_seeded, 3000, 0) > 100
