"""A fixed number of fuzz cases of the vsock device, with every run of the tests."""

import gc

from tests.descriptors import nothing_left_open
from tests.fuzz.fuzz_vsock_device import run_case

CASES = 60


def test_device_survives_any_guest_host_and_front_end() -> None:
    with nothing_left_open():
        for seed in range(CASES):
            try:
                run_case(seed)
            except BaseException as error:
                error.add_note(f"python -m tests.fuzz.fuzz_vsock_device --cases 1 --seed {seed}")
                raise
        # A device that is gone is a cycle, and its mappings hold descriptors until it is collected.
        gc.collect()
