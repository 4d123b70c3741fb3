"""Seeded cases of a target that counts the good ones, and the command line that runs more of them than the tests do."""

import argparse
import random
from collections.abc import Callable


def count_good(run_case: Callable[[random.Random], bool], cases: int, seed: int) -> int:
    """How many of the cases were good. Raises whatever a case may not."""
    return sum(run_case(random.Random(seed * 1_000_003 + number)) for number in range(cases))


def run_program(description: str | None, name: str, good: str, run_case: Callable[[random.Random], bool]) -> None:
    """The target as a program: runs --cases from --seed, and prints how many were `good`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = count_good(run_case, options.cases, options.seed)
    print(f"{name}: {options.cases} cases, {found} of them {good}")
