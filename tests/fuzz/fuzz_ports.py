"""Fuzzes the reading of listening ports: a guest's reports on the host, and the kernel's answers in the guest.

Longer than under pytest: python -m tests.fuzz.fuzz_ports --cases 1000000 --seed 1
"""

import contextlib
import random
import struct
from collections.abc import Sequence

from tests.fuzz.seeded import run_program
from vsh.forward.choice import render_target
from vshd.carry.endpoints import find_fixed
from vshd.services.listeners import LISTENERS_MAX, Seen, parse_diag, parse_table
from vshd.services.ports import choose_addresses
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.ports import PAYLOAD_MAX, PORTS_MAX, PortReport, ReportReader, encode_report

ADDRESSES = (bytes(4), b"\x7f\0\0\1", b"\x0a\0\0\1", bytes(16), bytes(15) + b"\1", b"\xfd" + bytes(15), bytes(5), b"")
TABLE_PIECES = (
    *(b"  sl  local_address rem_address   st\n", b"   0: ", b"0100007F:1F90 ", b"00000000:0050 ", b":", b"\n", b" 0A "),
    *(
        b"00000000000000000000000001000000:0050 ",
        b"00000000:0000 0A 0:0 00:0 0 0 0 4711 1 0 100\n",
        b" 01 ",
        b"\xff",
        b"-",
    ),
    b"   1: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 100\n",
)


def read_reports(data: bytes, cuts: Sequence[int]) -> tuple[dict[int, bytes] | None, str]:
    """The last report, and the fault that ends the reading."""
    reader = ReportReader()
    last = None
    start = 0
    for cut in (*sorted(cuts), len(data)):
        try:
            ports = reader.receive_data(data[start:cut])
        except RemoteProtocolError as error:
            return last, str(error)
        last = last if ports is None else ports
        start = cut
        assert len(reader._data) <= PAYLOAD_MAX + 4
    return last, ""


def check_reports(data: bytes, cuts: Sequence[int]) -> bool:
    """Raises AssertionError for what no guest may do. Returns whether there was a report."""
    ports, fault = read_reports(data, cuts)
    if not fault:
        assert read_reports(data, ())[0] == ports
    if ports is None:
        return False
    assert len(ports) <= PORTS_MAX
    for port, address in ports.items():
        assert 0 < port < 1 << 16
        # A place of the guest, and nothing else.
        assert all(found[1][1] == port for found in find_fixed(render_target(address, port)))
    return True


def check_kernel(rng: random.Random) -> bool:
    """The guest's own side: whatever the kernel says, what comes of it can be reported."""
    seen: list[Seen] = []
    if rng.random() < 0.5:
        text = b"".join(rng.choice(TABLE_PIECES) for _ in range(rng.randrange(20)))
        seen = parse_table(text[start : start + 64] for start in range(0, len(text), 64))
    else:
        for _ in range(rng.randrange(4)):
            body = rng.randbytes(rng.choice((4, 72, 80)))
            if rng.random() < 0.7:
                body = bytes((rng.choice((2, 10)), 10)) + body[2:]
            size = 16 + len(body) if rng.random() < 0.9 else rng.randrange(1 << 32)
            head = struct.pack("=IHHII", size, rng.choice((2, 3, 20)), 2, rng.choice((2, 2, 10)), 0)
            with contextlib.suppress(OSError):
                parse_diag(head + body, 2, seen)
    assert len(seen) <= LISTENERS_MAX
    ports = choose_addresses(seen)
    assert ReportReader().receive_data(encode_report(ports)) == ports
    return bool(ports)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it had ports. Raises whatever a case may not."""
    if rng.random() < 0.3:
        return check_kernel(rng)
    data = b""
    for _ in range(rng.randrange(4)):
        entries = [
            rng.choice(ADDRESSES) + rng.randrange(1 << 16).to_bytes(2, "big") for _ in range(rng.choice((0, 1, 3, 300)))
        ]
        if rng.random() < 0.7:
            entries = [entry for entry in entries if len(entry) in (6, 18) and any(entry[-2:])]
        payload = PortReport(entries, rng.choice((0, 5, 1 << 31))).encode()
        if rng.random() < 0.2:
            payload = rng.randbytes(rng.randrange(20))
        size = len(payload) if rng.random() < 0.95 else rng.randrange(1 << 32)
        data += size.to_bytes(4, "little") + payload
    return check_reports(data, [rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))])


if __name__ == "__main__":
    run_program(__doc__, "ports", "with ports", run_seeded)
