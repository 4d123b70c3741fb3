"""A fixed number of fuzz cases of what reads a root, with every run of the tests; each kind has good ones."""

import random
from collections.abc import Callable

import pytest

from tests.fuzz.fuzz_roots import run_disk, run_documents, run_qcow2, run_tar
from tests.fuzz.seeded import count_good


@pytest.mark.parametrize("run_case", [run_tar, run_disk, run_qcow2, run_documents])
def test_any_root_is_survived(run_case: Callable[[random.Random], bool]) -> None:
    assert count_good(run_case, 600, 0) > 30
