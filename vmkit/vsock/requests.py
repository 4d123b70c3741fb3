"""What a program may ask of the device at its control socket: requests as values, and their lines, for both ends. Pure.

A line is a word and `name=value` pairs: `fault kind=delay ports=9001 delay_ms=50`. The device answers with one line:
`ok COUNT`, then COUNT lines; or `error TEXT`. After `ok 0` to a `trace`, records follow until one side closes
(records.py). The syntax has no quotes, because no value has a blank.
"""

from typing import Any, Final, NamedTuple

MAX_LINE_BYTES: Final = 1024
MAX_PORTS: Final = 16
MAX_SNAPLEN_BYTES: Final = 65536
MAX_DELAY_MS: Final = 60_000
MAX_COUNT: Final = 2**40

TO_GUEST: Final = "to-guest"
TO_HOST: Final = "to-host"
DIRECTIONS: Final = (TO_GUEST, TO_HOST)

DELAY: Final = "delay"
RATE: Final = "rate"
RESET: Final = "reset"
FREEZE_CREDIT: Final = "freeze-credit"
HALF_CLOSE: Final = "half-close"
REFUSE: Final = "refuse"
FAULT_KINDS: Final = (DELAY, RATE, RESET, FREEZE_CREDIT, HALF_CLOSE, REFUSE)


class RequestError(Exception):
    """A line is no request; the text is for its sender."""


class TraceRequest(NamedTuple):
    """Send a record of each packet from now on. Empty filters match every packet.

    ports: of either side. snaplen: so many bytes of the payload at most.
    """

    ports: tuple[int, ...] = ()
    ops: tuple[int, ...] = ()
    direction: str = ""
    snaplen: int = 0

    def matches(self, op: int, src_port: int, dst_port: int, *, is_from_guest: bool) -> bool:
        """Whether the program asked for such a packet."""
        if self.direction and (self.direction == TO_HOST) != is_from_guest:
            return False
        if self.ops and op not in self.ops:
            return False
        return not self.ports or src_port in self.ports or dst_port in self.ports


class ReadRecent(NamedTuple):
    """Answer with one line for each recent packet: its record in hexadecimal digits, the oldest first."""


class Fault(NamedTuple):
    """A fault that the device brings about. Empty filters match every connection.

    ports: of either side. direction: of the bytes; for REFUSE, of the request. after: RESET, HALF_CLOSE and
    FREEZE_CREDIT wait until a connection has carried so many bytes; -1: at once, for the connections that are open.
    times: the fault ends after so many connections; 0: never. number and hits are set by the device.
    """

    kind: str
    ports: tuple[int, ...] = ()
    direction: str = ""
    delay_ms: int = 0
    bytes_s: int = 0
    after: int = -1
    times: int = 0
    number: int = 0
    hits: int = 0

    def matches_ports(self, host_port: int, guest_port: int) -> bool:
        """Whether it is for a connection of these ports."""
        return not self.ports or host_port in self.ports or guest_port in self.ports

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of bytes that it acts on."""
        return (self.direction,) if self.direction else DIRECTIONS


class ListFaults(NamedTuple):
    """Answer with one line for each fault that is active."""


class Clear(NamedTuple):
    """End a fault, or all of them when the number is 0."""

    number: int = 0


class Kill(NamedTuple):
    """End the process at once, as a crash would."""


Request = TraceRequest | ReadRecent | Fault | ListFaults | Clear | Kill
_WORDS: Final[dict[str, Any]] = {
    "trace": TraceRequest,
    "recent": ReadRecent,
    "fault": Fault,
    "faults": ListFaults,
    "clear": Clear,
    "kill": Kill,
}
_NAMES: Final = {kind: word for word, kind in _WORDS.items()}
_LIMITS: Final = {"snaplen": MAX_SNAPLEN_BYTES, "delay_ms": MAX_DELAY_MS}


def render_request(request: Request) -> bytes:
    """The request as its line. Fields with their default values are left out."""
    words = [_NAMES[type(request)]]
    for name, value in request._asdict().items():
        if value != request._field_defaults.get(name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{name}={text}")
    return " ".join(words).encode() + b"\n"


def parse_request(line: bytes) -> Request:
    """The request of a line. Raises RequestError."""
    try:
        word, *pairs = line.decode("ascii").split()
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestError("this line is no request") from error
    kind = _WORDS.get(word)
    if kind is None:
        raise RequestError(f"this device knows no request '{word}'")
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kind._fields or name in values:
            raise RequestError(f"'{word}' takes no '{pair}'")
        values[name] = _parse_value(name, text)
    if kind is Fault and "kind" not in values:
        raise RequestError("a fault needs a kind")
    request: Request = kind(**values)
    if isinstance(request, Fault):
        check_fault(request)
    return request


def check_fault(fault: Fault) -> None:
    """Raises RequestError for a fault that lacks a value, or has one that its kind does not take."""
    needs = {DELAY: fault.delay_ms, RATE: fault.bytes_s, HALF_CLOSE: fault.direction}
    if not needs.get(fault.kind, True):
        raise RequestError(f"'{fault.kind}' needs {_NEEDED[fault.kind]}")
    takes_after = fault.kind in (RESET, HALF_CLOSE, FREEZE_CREDIT)
    if fault.after >= 0 and not takes_after:
        raise RequestError(f"'{fault.kind}' takes no number of bytes to wait for")
    if fault.delay_ms and fault.kind != DELAY:
        raise RequestError(f"'{fault.kind}' takes no delay")
    if fault.bytes_s and fault.kind != RATE:
        raise RequestError(f"'{fault.kind}' takes no rate")


_NEEDED: Final = {DELAY: "a delay", RATE: "a rate", HALF_CLOSE: f"a direction: {TO_GUEST} or {TO_HOST}"}


def _parse_value(name: str, text: str) -> object:
    if name in ("ports", "ops"):
        words = text.split(",")
        if len(words) > MAX_PORTS:
            raise RequestError(f"{name}: at most {MAX_PORTS} numbers")
        return tuple(_parse_number(name, word, 2**32 - 1) for word in words)
    if name == "direction":
        return _parse_choice(name, text, DIRECTIONS)
    if name == "kind":
        return _parse_choice(name, text, FAULT_KINDS)
    return _parse_number(name, text, _LIMITS.get(name, MAX_COUNT))


def _parse_choice(name: str, text: str, words: tuple[str, ...]) -> str:
    if text not in words:
        raise RequestError(f"{name} must be one of {', '.join(words)}, not '{text}'")
    return text


def _parse_number(name: str, text: str, limit: int) -> int:
    if not text.isdigit() or len(text) > len(str(limit)) or int(text) > limit:
        raise RequestError(f"{name} must be a number from 0 to {limit}, not '{text}'")
    return int(text)


def render_answer(lines: list[bytes]) -> bytes:
    """The answer to a request that was carried out."""
    return b"ok %d\n" % len(lines) + b"".join(lines)


def render_error(text: str) -> bytes:
    """The answer to a request that was refused."""
    return f"error {text}\n".encode(errors="replace")
