"""Which ports of a guest are forwarded by themselves, and at which ports of this host: a choice without I/O.

Owns the lists of ports that a person gives, and the order in which ports of this host are tried.
"""

import _socket
from collections.abc import Callable, Iterable, Iterator

from vsh.errors import UsageError
from vsh.forward.spec import AUTOMATIC, LOOPBACK, TCP_PORT_MAX, ForwardSpec

# Ports of a guest at once; each costs two listeners here.
FORWARDED_MAX = 128
# How many ports of this host are tried for one of the guest.
TRIED_MAX = 64
# Where the ports go that only root may listen on: 80 to 8080, 443 to 8443.
PRIVILEGED_SHIFT = 8000

Ranges = tuple[range, ...]
EVERY_PORT: Ranges = (range(1, TCP_PORT_MAX + 1),)

ANY_ADDRESSES = (bytes(4), b"\x7f\0\0\1")
ANY_IPV6 = bytes(16)


class PortChange:
    """What became of one port of the guest.

    kind: OPENED, CLOSED or REFUSED. listening: where this host listens, as HOST:PORT. reason: why not at the same
    number, or not at all; empty otherwise.
    """

    __slots__ = ("kind", "listening", "port", "reason")

    OPENED, CLOSED, REFUSED = "opened", "closed", "refused"

    def __init__(self, kind: str, port: int, listening: tuple[str, ...] = (), reason: str = "") -> None:
        self.kind = kind
        self.port = port
        self.listening = listening
        self.reason = reason


class AutomaticSpec(ForwardSpec):
    """A forward of all ports that the guest listens on.

    on_change: gets each change. on_notice: gets a line about the connection to the guest, and about its limits.
    """

    __slots__ = ("exclude", "include", "on_change", "on_notice")

    def __init__(
        self,
        on_change: Callable[[PortChange], None],
        on_notice: Callable[[str], None],
        include: Ranges = EVERY_PORT,
        exclude: Ranges = (),
    ) -> None:
        super().__init__(AUTOMATIC, "every port", "the same")
        self.on_change = on_change
        self.on_notice = on_notice
        self.include = include
        self.exclude = exclude

    def choose(self, ports: dict[int, bytes], kept: Iterable[int]) -> tuple[dict[int, bytes], int]:
        """Those of the guest's ports that are forwarded, and how many are too many. kept: those that are already."""
        wanted = [port for port in ports if _is_in(port, self.include) and not _is_in(port, self.exclude)]
        had = frozenset(kept)
        wanted.sort(key=lambda port: (port not in had, port))
        return {port: ports[port] for port in wanted[:FORWARDED_MAX]}, max(0, len(wanted) - FORWARDED_MAX)


def parse_ports(texts: Iterable[str]) -> Ranges:
    """The ports in texts such as `80,8000-8099`. Raises UsageError."""
    ranges = []
    for word in ",".join(texts).split(","):
        first, dash, last = word.strip().partition("-")
        ports = _parse_range(first, last if dash else first)
        if ports is None:
            raise UsageError(
                f"'{word}' names no ports", hint="write ports and ranges from 1 to 65535, such as 80,8000-8099"
            )
        ranges.append(ports)
    return tuple(ranges)


def list_candidates(port: int, *, is_privileged: bool) -> Iterator[int]:
    """Ports of this host for one of the guest, after its own number was of no use. is_privileged: only root has it."""
    first = port + PRIVILEGED_SHIFT if is_privileged else port + 1
    above = range(first, min(first + TRIED_MAX, TCP_PORT_MAX + 1))
    yield from above
    # At the upper end there are few.
    below = min(port, TCP_PORT_MAX + 1) - 1
    yield from range(below, max(below - (TRIED_MAX - len(above)), 1023), -1)


def render_target(address: bytes, port: int) -> str:
    """The place in the guest, as a forward has it, of a port that listens at an address of 4 or 16 bytes."""
    if address in ANY_ADDRESSES:
        return f"tcp:{LOOPBACK}:{port}"
    if address == ANY_IPV6:
        # Of IPv4 too, most often; a guest without ::1 has that alone.
        return f"tcp:localhost:{port}"
    if len(address) == len(ANY_IPV6):
        return f"tcp:[{_socket.inet_ntop(_socket.AF_INET6, address)}]:{port}"
    return f"tcp:{_socket.inet_ntop(_socket.AF_INET, address)}:{port}"


def _parse_range(first: str, last: str) -> range | None:
    if not all(word.isascii() and word.isdigit() and len(word) <= 5 for word in (first, last)):
        return None
    ports = range(int(first), int(last) + 1)
    return ports if ports and ports[0] >= 1 and ports[-1] <= TCP_PORT_MAX else None


def _is_in(port: int, ranges: Ranges) -> bool:
    return any(port in ports for ports in ranges)
