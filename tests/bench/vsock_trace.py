"""What a trace costs the vsock device: `python -m tests.bench.vsock_trace [ROUNDS]`.

Prints the processor time of the device process for bulk each way and for round trips: without a trace, with one of
headers, and with one of whole payloads. Medians, alternating within one run. The guest is the tests' fake driver, so
no VM is needed; processor time and not wall time, because the driver is slower than the device.
"""

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.vmkit.vsock.device_process import Bench, open_bench
from vmkit.vsock.requests import MAX_SNAPLEN_BYTES

CHUNK = b"x" * (1 << 20)
CHUNKS = 96
ROUND_TRIPS = 4000
MODES = {"no trace": -1, "headers": 0, "whole payload": MAX_SNAPLEN_BYTES}
READER = """
import sys
from pathlib import Path
from vmkit.packets.control import open_control
from vmkit.vsock.requests import TraceRequest
with open_control(Path(sys.argv[1])) as control:
    print(sum(packet.dropped for packet in control.follow(TraceRequest(snaplen=int(sys.argv[2])))))
"""


def read_cpu_ms(pid: int) -> float:
    """utime and stime of proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def traced(bench: Bench, snaplen: int) -> Iterator[None]:
    """A program that follows the device; none for -1. It ends with the device."""
    if snaplen < 0:
        yield
        return
    argv = [sys.executable, "-c", READER, str(bench.control_path), str(snaplen)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    bench.wait_log("follows")
    yield
    bench.leave()
    print(f"    {process.communicate()[0].decode().strip()} packets dropped")


def measure(snaplen: int) -> tuple[float, float, float]:
    """Processor time in ms: to the guest, to the host, round trips."""
    with open_bench() as bench:
        bench.driver.boot()
        with traced(bench, snaplen):
            program, guest = bench.open_to_guest(9001)
            marks = [read_cpu_ms(bench.process.pid)]
            for _ in range(CHUNKS):
                program.send(CHUNK)
                bench.wait(lambda: len(guest.data) == len(CHUNK))
                guest.data.clear()
            marks.append(read_cpu_ms(bench.process.pid))
            for _ in range(CHUNKS):
                guest.send(CHUNK)
                bench.wait(lambda: len(program.data) == len(CHUNK))
                program.data.clear()
            marks.append(read_cpu_ms(bench.process.pid))
            for _ in range(ROUND_TRIPS):
                program.send(b"a")
                bench.wait(lambda: guest.data)
                guest.data.clear()
                guest.send(b"b")
                bench.wait(lambda: program.data)
                program.data.clear()
            marks.append(read_cpu_ms(bench.process.pid))
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, snaplen in MODES.items():
            print(f"  {mode}")
            found[mode].append(measure(snaplen))
    print(f"| CPU ms, medians of {rounds} | 96 MiB to the guest | 96 MiB to the host | {ROUND_TRIPS} round trips |")
    print("| --- | --- | --- | --- |")
    for mode, rows in found.items():
        cells = " | ".join(f"{statistics.median(column):.0f}" for column in zip(*rows, strict=True))
        print(f"| {mode} | {cells} |")


if __name__ == "__main__":
    main()
