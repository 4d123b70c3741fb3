"""What a call of maitred costs: `python -m tests.bench.maitred NAME [--calls COUNT]`.

NAME is a running machine whose image has the service. Prints the first call, which starts the server, and the median
and the 90th percentile of the others, in milliseconds; judges nothing.
"""

import argparse
import statistics
import time

from vmkit.maitred.client import Maitred
from vsh.address import find_by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    times_ms = []
    with Maitred(find_by_name(options.name), timeout_s=60.0) as client:
        for _ in range(options.calls + 1):
            start_s = time.perf_counter()
            client.get_available_space()
            times_ms.append((time.perf_counter() - start_s) * 1000)
    first_ms, *others_ms = times_ms
    print(f"first call: {first_ms:.0f} ms")
    median_ms, high_ms = statistics.median(others_ms), statistics.quantiles(others_ms, n=10)[-1]
    print(f"unary call: median {median_ms:.1f} ms, p90 {high_ms:.1f} ms")


if __name__ == "__main__":
    main()
