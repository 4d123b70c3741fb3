"""The TCP ports that a guest listens on, as it reports them to a client (docs/reference/protocol.md 3.6).

    server: a frame with a PortReport, at once and after each change

Each report lists all ports, so that a later one heals whatever became of an earlier one. Owns the report and its
limits, for both sides, without I/O.
"""

from vshd.wire.errors import RemoteProtocolError
from vshd.wire.frames import LENGTH_SIZE, encode_frame
from vshd.wire.proto3 import BYTES_LIST, UINT32, Field, Message

# A report has at most so many ports, the lowest ones.
PORTS_MAX = 256
# An entry is an address of 4 or 16 bytes and a port of 2, both as in network headers.
PORT_SIZE = 2
ADDRESS_SIZES = (4, 16)
# All of IPv6, with a tag and a length of one byte each, and the number of those left out.
PAYLOAD_MAX = PORTS_MAX * (2 + max(ADDRESS_SIZES) + PORT_SIZE) + 16
_PORT_NUMBERS = range(1, 1 << 16)


class PortReport(Message):
    """entries: the address and port of each listener. left_out: how many more ports there are."""

    __slots__ = ("entries", "left_out")

    FIELDS = (Field(1, "entries", BYTES_LIST), Field(2, "left_out", UINT32))

    def __init__(self, entries: list[bytes] | None = None, left_out: int = 0) -> None:
        self.entries = [] if entries is None else entries
        self.left_out = left_out


def encode_report(ports: dict[int, bytes]) -> bytes:
    """The frame that reports these ports, each with its address."""
    chosen = sorted(ports)[:PORTS_MAX]
    entries = [ports[port] + port.to_bytes(PORT_SIZE, "big") for port in chosen]
    return encode_frame(PortReport(entries, len(ports) - len(chosen)).encode(), PAYLOAD_MAX)


class ReportReader:
    """The client's side. Invariant: `_data` is the beginning of one frame, no longer than a frame can be."""

    __slots__ = ("_data", "left_out")

    def __init__(self) -> None:
        self._data = b""
        # Of the last report.
        self.left_out = 0

    def receive_data(self, data: bytes) -> dict[int, bytes] | None:
        """The ports of the last report in `data`, each with its address; None when no report is whole.

        Raises RemoteProtocolError for what is no report.
        """
        self._data += data
        payload = None
        while len(self._data) >= LENGTH_SIZE:
            size = int.from_bytes(self._data[:LENGTH_SIZE], "little")
            if size > PAYLOAD_MAX:
                raise RemoteProtocolError(f"a report of {size} bytes; {PAYLOAD_MAX} is the limit")
            if len(self._data) < LENGTH_SIZE + size:
                break
            payload = self._data[LENGTH_SIZE : LENGTH_SIZE + size]
            self._data = self._data[LENGTH_SIZE + size :]
        return None if payload is None else self._parse(payload)

    def _parse(self, payload: bytes) -> dict[int, bytes]:
        report = PortReport()
        report.merge(payload)
        if len(report.entries) > PORTS_MAX:
            raise RemoteProtocolError(f"a report of {len(report.entries)} ports; {PORTS_MAX} is the limit")
        ports = {}
        for entry in report.entries:
            address, port = entry[:-PORT_SIZE], int.from_bytes(entry[-PORT_SIZE:], "big")
            if len(address) not in ADDRESS_SIZES or port not in _PORT_NUMBERS:
                raise RemoteProtocolError("a report with an entry that is no address and port")
            ports[port] = address
        self.left_out = report.left_out
        return ports
