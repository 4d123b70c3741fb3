"""The fuzz targets of tests.fuzz.seeded as programs."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fuzz_btf", "btf: 20 cases, {} of them whole\n"),
        ("fuzz_kernel_log", "kernel log: 20 cases, {} of them with records\n"),
    ],
)
def test_program_runs_its_cases_from_the_seed(module: str, line: str) -> None:
    words = [sys.executable, "-m", f"tests.fuzz.{module}", "--cases", "20", "--seed"]
    first, again, other = (
        subprocess.run([*words, seed], capture_output=True, text=True, timeout=60, check=True).stdout
        for seed in ("3", "3", "8")
    )
    before, after = line.split("{}")
    assert first.startswith(before)
    assert first.endswith(after)
    assert (first == again, first == other) == (True, False)
