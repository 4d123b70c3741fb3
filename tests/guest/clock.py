"""How far a guest's clock is off."""

import time

from vsh.client import Client

# A restored guest is to have the time to this.
CLOCK_LIMIT_S = 0.05
# Answers each line with the guest's clock.
CLOCK = "import sys, time\nfor _ in sys.stdin: print(time.time_ns(), flush=True)"
QUESTIONS = 20


def read_clock_error_s(client: Client) -> float:
    """How far the guest's clock is off at least: what the journey of the quickest answer cannot explain."""
    best = (float("inf"), 0.0)
    with client.popen(["python3", "-ISBc", CLOCK], text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(QUESTIONS):
            start_s = time.time()
            process.stdin.write("\n")
            process.stdin.flush()
            guest_s = int(process.stdout.readline()) / 1e9
            end_s = time.time()
            best = min(best, (end_s - start_s, guest_s - (start_s + end_s) / 2))
        process.stdin.close()
        process.wait()
    round_trip_s, offset_s = best
    return max(0.0, abs(offset_s) - round_trip_s / 2)
