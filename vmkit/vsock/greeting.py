"""The line by which a host program names the guest port it wants, and the answer to it. Pure text.

The convention is Firecracker's hybrid vsock, which vhost-device-vsock shares. The program sends `CONNECT <port>\\n`,
and reads `OK <host port>\\n` once the guest has accepted. A refusal is a close without an answer. One refusal has a
line of our own: `FULL <places>\\n` before the close means that all places for connections are taken.
"""

from typing import Final

# "CONNECT 4294967294\n" has 19 bytes; a longer line is no such line.
GREETING_MAX_BYTES: Final = 32
# VMADDR_PORT_ANY, linux/vm_sockets.h: not a port.
_PORT_ANY: Final = 2**32 - 1
_PREFIX: Final = b"CONNECT "


class GreetingError(Exception):
    """The host program did not send `CONNECT <port>`; the text shows what it sent."""


class Greeting:
    """A complete CONNECT line: the guest port, and how many bytes the line took. The stream begins behind them."""

    __slots__ = ("port", "size_bytes")

    def __init__(self, port: int, size_bytes: int) -> None:
        self.port = port
        self.size_bytes = size_bytes


def find_greeting(data: bytes) -> Greeting | None:
    """Returns the CONNECT line at the start of `data`, or None while it is incomplete.

    Raises GreetingError when it can never be one.
    """
    end = data.find(b"\n", 0, GREETING_MAX_BYTES)
    if end < 0:
        if len(data) >= GREETING_MAX_BYTES or data[: len(_PREFIX)] != _PREFIX[: len(data)]:
            raise GreetingError(f"not a CONNECT line: {data[:GREETING_MAX_BYTES]!r}")
        return None
    digits = data[len(_PREFIX) : end]
    # isdigit of bytes is ASCII only; int() alone would also take signs, blanks and underscores.
    if not data.startswith(_PREFIX) or not digits.isdigit() or int(digits) >= _PORT_ANY:
        raise GreetingError(f"not a CONNECT line: {data[:end]!r}")
    return Greeting(int(digits), end + 1)


def render_answer(host_port: int) -> bytes:
    """Returns the line that the host program reads once the guest has accepted."""
    return b"OK %d\n" % host_port


def render_full(places: int) -> bytes:
    """Returns the line that the host program reads when all places for connections are taken."""
    return b"FULL %d\n" % places
