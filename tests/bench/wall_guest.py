"""The guest's side of tests.bench.wall, for root: prints {kind: {side: [[ns of one connect, ...] of a block, ...]}}.

Detached means that the pins, the last that holds the programs, are unlinked; attached again, that the loader ran again.
argv: blocks of each side, connects in a block.
"""

import _socket
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BPFFS = "/sys/fs/bpf"
LOADER = "/usr/lib/vmkit/raise-wall"
PINS = ("vshd_connect", "vshd_bind")
# Nobody listens there: the host's device refuses, which is the shortest way there and back.
HOST = (2, 50000)
UNIX = "\0bench"
# Changing the kernel's code makes it, and the translator below it, slow for a moment.
WARM_UP = 20


def detach() -> None:
    for pin in PINS:
        Path(BPFFS, pin).unlink()
    subprocess.run(["umount", BPFFS], check=True)
    # Unlinked programs are taken off the hook a moment later, by a worker of the kernel.
    while connect_once(_socket.AF_VSOCK, (1, 1))[1] == 1:
        time.sleep(0.01)


def attach() -> None:
    subprocess.run([LOADER], check=True)
    assert connect_once(_socket.AF_VSOCK, (1, 1))[1] == 1


def connect_once(family: int, address: tuple[int, int] | str) -> tuple[int, int]:
    """(nanoseconds, errno) of one connect()."""
    connection = _socket.socket(family, _socket.SOCK_STREAM)
    if address[0] == 1:
        # The loopback is not there: without the program this would wait for an answer that never comes.
        connection.setblocking(False)
    started = time.perf_counter_ns()
    error = connection.connect_ex(address)
    ended = time.perf_counter_ns()
    connection.close()
    return ended - started, error


# Family, address, the errno to expect, and the listener that accepts.
Kind = tuple[int, tuple[int, int] | str, int, _socket.socket | None]


def run_block(kinds: dict[str, Kind], size: int) -> dict[str, list[int]]:
    """{kind: [ns]} of `size` connects of each kind; what comes first after a change is not counted."""
    times: dict[str, list[int]] = {}
    for kind, (family, address, expected, listener) in kinds.items():
        times[kind] = []
        for number in range(size + WARM_UP):
            nanoseconds, error = connect_once(family, address)
            assert error == expected, error
            if listener is not None:
                os.close(listener._accept()[0])  # type: ignore[attr-defined]  # typeshed lacks it
            if number >= WARM_UP:
                times[kind].append(nanoseconds)
    return times


def main() -> None:
    blocks, size = int(sys.argv[1]), int(sys.argv[2])
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(UNIX)
    listener.listen(4)
    kinds: dict[str, Kind] = {
        "vsock": (_socket.AF_VSOCK, HOST, 104, None),
        "unix": (_socket.AF_UNIX, UNIX, 0, listener),
    }
    series: dict[str, dict[str, list[list[int]]]] = {kind: {"attached": [], "detached": []} for kind in kinds}
    sides = ["attached", "detached"]
    for _ in range(blocks):
        # Attached, detached, detached, attached: whatever drifts falls on both sides.
        for side in sides:
            for kind, times in run_block(kinds, size).items():
                series[kind][side].append(times)
            if side is sides[0]:
                detach() if side == "attached" else attach()
        sides.reverse()
    print(json.dumps(series))


main()
