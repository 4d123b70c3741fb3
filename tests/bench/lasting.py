"""Sessions that last, in a guest: `python -m tests.bench.lasting MACHINE [--rounds N]`.

Prints how long vsh takes to the first bytes of a session that keeps 10 MB of output, beside `vsh -- echo hi`, in turns,
and the memory of the process that keeps an idle session. MACHINE must run. Judges nothing.
"""

import argparse
import os
import pty
import statistics
import subprocess
import time
from collections.abc import Sequence

from vmkit.bench.testbed import plan_vsh
from vsh.address import find_by_name
from vsh.client import Client

KEPT_BYTES = 10_000_000
IDLE = 5
# Runs in the guest: 10 MB of lines, and then nothing.
PRINT = f"yes 'a line that a session keeps' | head -c {KEPT_BYTES}; sleep 100000"
# The keepers are the parents of the idle commands.
MEMORY = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if open(f"/proc/{pid}/cmdline").read() == "sleep\\x00100001\\x00":
            keeper = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]
            rows = [line.split() for line in open(f"/proc/{keeper}/smaps_rollup")]
            print(sum(int(row[1]) for row in rows if row[0] in ("Private_Dirty:", "Private_Clean:")))
    except OSError:
        continue
"""


def time_first_bytes(argv: Sequence[str], *, has_terminal: bool) -> float:
    """Seconds from the start of vsh until it has printed something."""
    reading, writing = pty.openpty() if has_terminal else os.pipe()
    started = time.perf_counter()
    with subprocess.Popen(argv, stdin=writing if has_terminal else subprocess.DEVNULL, stdout=writing) as process:
        os.close(writing)
        os.read(reading, 100)
        seconds = time.perf_counter() - started
        process.kill()
    os.close(reading)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="Sessions that last, in a guest.")
    parser.add_argument("machine")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    client = Client(find_by_name(options.machine))
    session = client.start(["sh", "-c", PRINT], output_size=16 << 20)
    idle = []
    try:
        while session.look().end < KEPT_BYTES:
            time.sleep(0.1)
        vsh = plan_vsh(options.machine)
        sides = {
            "--attach": ([*vsh, f"--attach={session.id}", "--since=0", "--steal"], False),
            "--attach, at a terminal": ([*vsh, f"--attach={session.id}", "--steal"], True),
            "echo hi": ([*vsh, "--", "echo", "hi"], False),
        }
        seen: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, (argv, has_terminal) in sides.items():
                seconds = time_first_bytes(argv, has_terminal=has_terminal)
                # The first turn of each does not count.
                if number:
                    seen[name].append(seconds)
        for name, seconds_of in seen.items():
            print(f"{name:24} {1000 * statistics.median(seconds_of):6.0f} ms to the first bytes")
        idle = [client.start(["sleep", "100001"]) for _ in range(IDLE)]
        sizes = [int(line) for line in client.run(["python3", "-c", MEMORY], text=True).stdout.split()]
        print(f"an idle session: {statistics.median(sizes):.0f} KiB of its keeper's own")
    finally:
        for one in (session, *idle):
            one.kill()
            one.wait()
            one.forget()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
