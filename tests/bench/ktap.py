"""What KTAP costs: `python -m tests.bench.ktap [--rounds N] [--lines N]`.

Three outputs of so many lines (kselftest's harness in its runner, KUnit in a kernel's log, and a log with one test) are
read, and written as JUnit, in turns: seconds of the processor, which other programs disturb less. The last column is
the program itself with a report, by the clock. Prints medians; judges nothing.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmkit.junit import render_junit
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import make_case

# As `vmkit ktap` reads.
READ_BYTES = 256 * 1024


def make_kselftest(lines: int) -> list[str]:
    """100 lines a program, four of them each test of its harness."""
    programs = lines // 100
    made = ["TAP version 13", f"1..{programs}"]
    for number in range(1, programs + 1):
        made += [f"# selftests: net: program_{number}", "# TAP version 13", "# 1..24"]
        for test in range(1, 25):
            made += [
                f"# #  RUN           global.test_{test} ...",
                f"# # program.c:{test}:test_{test}:Expected 1 (1) == 1 (1)",
                f"# #            OK  global.test_{test}",
                f"# ok {test} global.test_{test}",
            ]
        made.append(f"ok {number} selftests: net: program_{number}")
    return made


def make_kunit(lines: int) -> list[str]:
    """100 lines a suite, every second one a result, with the kernel's time stamps."""
    suites = lines // 100
    made = ["KTAP version 1", f"1..{suites}"]
    for number in range(1, suites + 1):
        made += ["    KTAP version 1", f"    # Subtest: suite_{number}", "    1..48"]
        for test in range(1, 49):
            made += [f"    # test_{test}: initializing", f"    ok {test} test_{test}"]
        made.append(f"ok {number} suite_{number}")
    return [f"[{index / 1000:12.6f}] {line}" for index, line in enumerate(made)]


def make_log(lines: int) -> list[str]:
    """A long log with one test."""
    noise = [f"[{index / 1000:12.6f}] systemd[1]: Started unit {index}." for index in range(lines)]
    return ["KTAP version 1", "1..1", *noise, "ok 1 all"]


MAKERS: dict[str, Callable[[int], list[str]]] = {"kselftest": make_kselftest, "KUnit": make_kunit, "log": make_log}


def measure(data: bytes) -> tuple[float, float, int]:
    """Seconds of the reading and of the report, and how many tests there are."""
    started = time.process_time()
    parser = KtapParser()
    results = []
    for start in range(0, len(data), READ_BYTES):
        results += parser.receive_data(data[start : start + READ_BYTES])
    results += parser.receive_end()
    read = time.process_time()
    render_junit("ktap", (make_case(result, "ktap") for result in results))
    return read - started, time.process_time() - read, len(results)


def measure_program(path: Path) -> float:
    """Seconds of one `vmkit ktap` with a report."""
    argv = [sys.executable, "-m", "vmkit", "ktap", str(path), "--junit", f"{path}.xml"]
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="What KTAP costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=100_000)
    options = parser.parse_args()
    outputs = {name: "\n".join(make(options.lines)).encode() + b"\n" for name, make in MAKERS.items()}
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in outputs}
    programs: dict[str, list[float]] = {name: [] for name in outputs}
    with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as folder:
        for _ in range(options.rounds):
            for name, data in outputs.items():
                rows[name].append(measure(data))
                path = Path(folder) / name
                path.write_bytes(data)
                programs[name].append(measure_program(path))
    print(f"{options.lines} lines, medians of {options.rounds}, in seconds")
    print(f"{'output':10} {'tests':>7} {'read':>7} {'report':>7} {'vmkit ktap':>11}")
    for name, found in rows.items():
        read, report = (statistics.median(row[index] for row in found) for index in (0, 1))
        program = statistics.median(programs[name])
        print(f"{name:10} {found[0][2]:7} {read:7.2f} {report:7.2f} {program:11.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
