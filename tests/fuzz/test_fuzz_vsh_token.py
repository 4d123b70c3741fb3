"""A fixed number of fuzz cases of the token's handshake, with every run of the tests."""

import pytest

from tests.fuzz.fuzz_vsh_token import TARGETS, run_cases


@pytest.mark.parametrize("name", TARGETS)
def test_no_stranger_gets_by(name: str) -> None:
    run_cases(name, 1500, 0)
