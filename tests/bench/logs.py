"""The log of a guest on its way to the host: `python -m tests.bench.logs`.

In a guest of `tiny` on TCG a program writes 100,000 lines, 10,000 a second where the guest can, and the host counts the
lines that arrive, while it follows the log. In another guest 1,000 lines a second are written while the host reads
nothing for 10 s. Prints, and judges nothing.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import vmkit
from tests.bench.cores import MEMORY
from vmkit.machine.syslog import read_records

SECONDS = 10
LINES_A_SECOND = 10_000
# A look at the clock before and after each line is most of the time of one.
STOPPED_LINES_A_SECOND = 1_000
# The monitor connects two seconds after READY.
SETTLE_S = 5.0
END = "end of the bench"
# Runs in the guest: lines at a steady rate, in bursts of 10 ms. Prints their number, the rate, and the longest time of
# a burst and of a line in milliseconds. A look at the clock for each line would be a part of what a line costs.
WRITE = """
import socket, sys, time
rate, seconds, is_timed = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "timed"
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect("/dev/log")
burst = rate // 100
longest = longest_burst = number = 0
begin = time.monotonic()
while number < rate * seconds:
    ahead = begin + number / rate - time.monotonic()
    if ahead > 0:
        time.sleep(ahead)
    begin_burst = before = time.monotonic()
    for number in range(number, number + burst):
        s.send(b"<14>flood: line %d of a usual length, with some words of a program that says what it does" % number)
        if is_timed:
            now = time.monotonic()
            longest, before = max(longest, now - before), now
    number += 1
    longest_burst = max(longest_burst, time.monotonic() - begin_burst)
print(number, number / (time.monotonic() - begin), longest_burst * 1000, longest * 1000)
"""


class Counted:
    """Counts the lines of a machine's log in a thread, until one says that it is the last."""

    def __init__(self, name: str) -> None:
        self.lines = self.dropped = 0
        self._name = name
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        for record in read_records(self._name, is_following=True):
            dropped = record.get("dropped")
            self.dropped += dropped if isinstance(dropped, int) else 0
            self.lines += record.get("ident") == "flood"
            if record.get("text") == END:
                return

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


@contextmanager
def counted() -> Iterator[tuple[vmkit.Machine, Counted]]:
    """A machine, and the count of its lines."""
    with vmkit.Machine("tiny", accelerator="tcg", backend="user", memory="512M") as machine:
        time.sleep(SETTLE_S)
        yield machine, Counted(machine.name)


def write(machine: vmkit.Machine, rate: int, timed: str = "") -> list[float]:
    """Lines in all, lines a second, and the longest burst and line in milliseconds."""
    words = ["python3", "-c", WRITE, str(rate), str(SECONDS), timed]
    return [float(word) for word in machine.run(words, text=True, check=True).stdout.split()]


def end_count(machine: vmkit.Machine, count: Counted) -> str:
    machine.run(["logger", END], check=True)
    return "" if count.wait(60.0) else " (the last line is missing)"


def bench_rate() -> None:
    with counted() as (machine, count):
        lines, rate, burst_ms, _ = write(machine, LINES_A_SECOND)
        late = end_count(machine, count)
        print(f"{lines:.0f} lines written at {rate:.0f} a second, a hundred of them in {burst_ms:.0f} ms at most")
        print(f"{count.lines} lines arrived, {count.dropped} were dropped{late}", flush=True)


def bench_stopped_host() -> None:
    with counted() as (machine, count):
        before_kib = read_memory_kib(machine)
        monitor = machine.find_entry().pid
        os.kill(monitor, signal.SIGSTOP)
        try:
            lines, rate, _, line_ms = write(machine, STOPPED_LINES_A_SECOND, "timed")
            after_kib = read_memory_kib(machine)
        finally:
            os.kill(monitor, signal.SIGCONT)
        late = end_count(machine, count)
        print(f"beside a host that reads nothing for {SECONDS} s: {lines:.0f} lines at {rate:.0f} a second")
        print(f"a line took {line_ms:.1f} ms at most; vshd has {before_kib} KiB before and {after_kib} KiB then (PSS)")
        print(f"{count.lines} lines arrived, {count.dropped} were dropped{late}", flush=True)


def read_memory_kib(machine: vmkit.Machine) -> int:
    return int(machine.run(["python3", "-c", MEMORY], text=True, check=True).stdout)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
    bench_rate()
    bench_stopped_host()


if __name__ == "__main__":
    main()
