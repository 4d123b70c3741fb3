"""What `vsh --record` costs: `python -m tests.bench.recording MACHINE [--rounds N] [--megabytes N]`.

vsh prints a file of the guest into a pipe that is read to its end, with and without a recording, in turns. One file is
text, the other random bytes, which become base64 in the recording. MACHINE must run. Prints medians; judges nothing.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmkit.bench.testbed import plan_vsh
from vsh.address import find_by_name
from vsh.client import Client

MIB = 1 << 20
# Runs in the guest.
MAKE = """
import os, sys
size = int(sys.argv[1])
line = b"make[2]: Entering directory '/src/linux/drivers/vhost' and what else a build prints\\n"
block = line * ((1 << 20) // len(line) + 1)
for name in ("text", "bytes"):
    with open(f"/tmp/recording-{name}", "wb") as file:
        for _ in range(size >> 20):
            file.write(block[: 1 << 20] if name == "text" else os.urandom(1 << 20))
"""
KINDS = ("text", "bytes")


def run(machine: str, kind: str, record: Path | None) -> float:
    """Seconds of one vsh."""
    flags = [] if record is None else [f"--record={record}"]
    argv = [*plan_vsh(machine), *flags, "--", "cat", f"/tmp/recording-{kind}"]
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="What vsh --record costs.")
    parser.add_argument("machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=48)
    options = parser.parse_args()
    client = Client(find_by_name(options.machine))
    client.run(["python3", "-I", "-S", "-c", MAKE, str(options.megabytes * MIB)], check=True)
    for kind in KINDS:
        plain, recorded = [], []
        with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as folder:
            run(options.machine, kind, None)
            for number in range(options.rounds):
                plain.append(run(options.machine, kind, None))
                file = Path(folder) / str(number)
                recorded.append(run(options.machine, kind, file))
                size = file.stat().st_size
                file.unlink()
        without, with_ = statistics.median(plain), statistics.median(recorded)
        rate = options.megabytes * MIB / 1e6
        print(
            f"{kind:>5}: {rate / without:6.1f} MB/s, recorded {rate / with_:6.1f} MB/s, {with_ / without:.3f} of the "
            f"time; {options.megabytes} MiB are {size / MIB:.0f} MiB in the file"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
