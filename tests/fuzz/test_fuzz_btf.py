"""A fixed number of fuzz cases of the BTF reader, with every run of the tests."""

from tests.fuzz.fuzz_btf import run_cases


def test_any_bytes_are_survived() -> None:
    assert run_cases(3000, 0) > 100
