"""Containers in a guest: `python -m tests.bench.containers SOURCE [--rounds COUNT] [--memory SIZE]`.

Prints how long it takes to make a container of SOURCE, to start it, and to run `true` in it by
`vsh --target_container`, beside `vsh -- true` in the guest, in turns. Starts a machine of the image `containers`, and
ends it. SOURCE needs a program `true`. Judges nothing.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time

from vmkit.bench.testbed import plan_vsh
from vmkit.containers.containers import Containers
from vmkit.machine.machine import Machine


def time_run(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="Containers in a guest.")
    parser.add_argument("source")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", default="1G")
    options = parser.parse_args()
    with Machine("containers", name="bench-containers", memory=options.memory) as machine:
        containers = Containers(machine)
        moments = [time.perf_counter()]
        containers.create("first", options.source)
        moments.append(time.perf_counter())
        # The guest has the root already.
        containers.create("box", options.source)
        moments.append(time.perf_counter())
        containers.start("box")
        moments.append(time.perf_counter())
        first, again, start = (end - begin for begin, end in itertools.pairwise(moments))
        print(f"create {first:.2f} s, again {again:.2f} s, start {start:.2f} s")
        vsh = plan_vsh(machine.name)
        took: dict[str, list[float]] = {"in the guest": [], "in the container": []}
        for _ in range(options.rounds):
            took["in the guest"].append(time_run([*vsh, "--", "true"]))
            took["in the container"].append(time_run([*vsh, "--target_container=box", "--", "true"]))
        for name, seconds in took.items():
            median, worst = statistics.median(seconds), max(seconds)
            print(f"vsh -- true {name}: median {median:.3f} s, worst {worst:.3f} s of {len(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
