"""Plays the two peers of tests/vmkit/vsock/test_two_peers.py for longer than under pytest:
python -m tests.fuzz.fuzz_vsock_peers --cases 10000
"""

import argparse
import sys

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.vmkit.vsock.test_two_peers import TwoPeers

TURNS_PER_CASE = 80


def main() -> int:
    """Plays cases of new turns; what fails is shortened and printed as the calls that lead there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    options = parser.parse_args()
    run_state_machine_as_test(
        TwoPeers,
        settings=settings(
            max_examples=options.cases,
            stateful_step_count=TURNS_PER_CASE,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{options.cases} cases passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
