"""The client's end of a D-Bus connection without a bus, as bytes (D-Bus specification 0.42). No I/O.

Owns what vshd needs for a service manager's private socket: the authentication EXTERNAL, calls whose arguments are
strings, and the reading of any value. The peer is root's, and its messages still have limits. Texts stay bytes.
"""

from vshd.wire.errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    ByteOrder = Literal["little", "big"]

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
# The specification allows 128 MiB.
MESSAGE_MAX = 1 << 20
LINE_MAX = 256
# Containers within containers. The specification has 64.
DEPTH_MAX = 16
SIGNATURE_MAX = 255
# Each value becomes an object.
VALUES_MAX = 1 << 16
HEAD_SIZE = 16
VERSION = 1
_ORDERS: "dict[int, ByteOrder]" = {ord("l"): "little", ord("B"): "big"}
# The codes of a header's fields, and their types.
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_TO, DESTINATION, SENDER, SIGNATURE = range(1, 9)
_TYPES = {PATH: "o", INTERFACE: "s", MEMBER: "s", ERROR_NAME: "s", REPLY_TO: "u", SIGNATURE: "g"}
# The size of each type that has one: all of them are numbers. That of a fraction is its bits.
_FIXED = {"y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8, "h": 4}
_SIGNED = "nix"
_ALIGNMENT = {**_FIXED, "g": 1, "v": 1, "(": 8, "{": 8}
_STRINGS = "sog"

Value = object


class BusMessage:
    """A message that came. reply_to: the serial of the call that a RETURN or an ERROR answers."""

    __slots__ = ("_body", "_order", "interface", "kind", "member", "path", "reply_to", "signature")

    def __init__(self, kind: int, fields: dict[int, Value], body: bytes, order: "ByteOrder") -> None:
        self.kind = kind
        self.path = _take_bytes(fields, PATH)
        self.interface = _take_bytes(fields, INTERFACE)
        self.member = _take_bytes(fields, MEMBER)
        self.signature = _take_bytes(fields, SIGNATURE).decode("ascii", "replace")
        reply_to = fields.get(REPLY_TO, 0)
        self.reply_to = reply_to if isinstance(reply_to, int) else 0
        self._body = body
        self._order = order

    def begins_with(self, text: bytes) -> bool:
        """Whether the first argument is this text."""
        return self._body[4:].startswith(text + b"\0")

    def mentions(self, text: bytes) -> bool:
        """Whether the arguments have these bytes. It costs little, and reading costs much."""
        return text in self._body

    def read(self) -> list[Value]:
        """The arguments. Texts, paths, signatures and arrays of bytes are bytes, and a variant is its value.

        Raises RemoteProtocolError.
        """
        values = _Values(self._body, self._order)
        found = list(values.take_all(self.signature))
        if values.at != len(self._body):
            raise RemoteProtocolError("a D-Bus message is longer than its arguments")
        return found


class BusClient:
    """One connection. `outgoing` is what the caller has to send.

    Invariant: `_held` has the calls that wait for the end of the authentication; None: it has ended.
    """

    def __init__(self, uid: int, wanted: bytes = b"") -> None:
        """uid: this process's own, which the peer knows from the kernel. wanted: signals without these bytes are left
        out, unread.
        """
        self.outgoing = b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n"
        self._held: bytes | None = b""
        self._data = b""
        self._wanted = wanted
        self._serial = 0

    @property
    def is_open(self) -> bool:
        """Whether the peer has let us in."""
        return self._held is None

    def call(self, path: str, interface: str, member: str, *args: "bytes | list[bytes]") -> int:
        """Calls a method with strings and arrays of strings; the call's serial, which the answer has."""
        self._serial += 1
        message = encode_message(
            CALL,
            self._serial,
            ((PATH, path.encode()), (INTERFACE, interface.encode()), (MEMBER, member.encode())),
            args,
        )
        if self._held is None:
            self.outgoing += message
        else:
            self._held += message
        return self._serial

    def receive(self, data: bytes) -> "Iterator[BusMessage]":
        """Yields each whole message. Raises RemoteProtocolError, also where the peer lets us not in."""
        self._data += data
        if self._held is not None and not self._take_line():
            return
        at = 0
        while size := self._measure(at):
            start, end = at, at + size
            at = end
            if self._data[start + 1] != SIGNAL or self._data.find(self._wanted, start, end) >= 0:
                yield self._take(start, end)
        self._data = self._data[at:]

    def _take_line(self) -> bool:
        """The peer's answer to the authentication; whether it is whole."""
        line, end, rest = self._data.partition(b"\r\n")
        if len(line) > LINE_MAX:
            raise RemoteProtocolError("the answer to the D-Bus authentication is too long")
        if not end:
            return False
        if not line.startswith(b"OK "):
            raise RemoteProtocolError(f"the D-Bus authentication failed: {line.decode('ascii', 'replace')}")
        assert self._held is not None
        self.outgoing += b"BEGIN\r\n" + self._held
        self._held, self._data = None, rest
        return True

    def _measure(self, at: int) -> int:
        """The size of the message that begins there; 0: it is not whole."""
        data = self._data
        if len(data) - at < HEAD_SIZE:
            return 0
        order = _ORDERS.get(data[at])
        if order is None or data[at + 3] != VERSION:
            raise RemoteProtocolError("a D-Bus message with an unknown beginning")
        body_size = int.from_bytes(data[at + 4 : at + 8], order)
        fields_size = int.from_bytes(data[at + 12 : at + HEAD_SIZE], order)
        size = _find_body(fields_size) + body_size
        if size > MESSAGE_MAX:
            raise RemoteProtocolError(f"a D-Bus message of {size} bytes")
        return size if len(data) - at >= size else 0

    def _take(self, start: int, end: int) -> BusMessage:
        data = self._data[start:end]
        order = _ORDERS[data[0]]
        body = _find_body(int.from_bytes(data[12:HEAD_SIZE], order))
        return BusMessage(data[1], read_fields(data[:body], order), data[body:], order)


def _find_body(fields_size: int) -> int:
    return (HEAD_SIZE + fields_size + 7) & ~7


def read_fields(head: bytes, order: "ByteOrder") -> dict[int, Value]:
    """The fields of a header. Raises RemoteProtocolError."""
    values = _Values(head, order)
    values.at = HEAD_SIZE - 4
    (entries,) = values.take_all("a(yv)")
    assert isinstance(entries, list)
    fields: dict[int, Value] = {}
    for code, value in entries:
        expected = int if _TYPES.get(code) == "u" else bytes
        if code in _TYPES and not isinstance(value, expected):
            raise RemoteProtocolError(f"field {code} of a D-Bus message is of another type")
        fields[code] = value
    return fields


def encode_message(
    kind: int,
    serial: int,
    fields: "tuple[tuple[int, bytes], ...]",
    args: "tuple[bytes | list[bytes], ...]" = (),
    body: bytes = b"",
    signature: str = "",
) -> bytes:
    """A message in the order of little ends. body: of the signature, in the place of args."""
    if args:
        signature = "".join("as" if isinstance(arg, list) else "s" for arg in args)
        written = bytearray()
        for arg in args:
            _write(written, arg)
        body = bytes(written)
    if signature:
        fields = (*fields, (SIGNATURE, signature.encode()))
    head = bytearray()
    for code, value in fields:
        _pad(head, 8)
        kind_of = _TYPES[code]
        head += bytes((code, 1)) + kind_of.encode() + b"\0"
        if kind_of == "g":
            head += bytes((len(value),)) + value + b"\0"
        elif kind_of == "u":
            _pad(head, 4)
            head += value
        else:
            _write(head, value)
    first = bytes((ord("l"), kind, 0, VERSION)) + b"".join(
        number.to_bytes(4, "little") for number in (len(body), serial, len(head))
    )
    _pad(head, 8)
    return first + bytes(head) + body


def _write(out: bytearray, value: "bytes | list[bytes]") -> None:
    _pad(out, 4)
    if isinstance(value, list):
        inner = bytearray()
        for one in value:
            _write(inner, one)
        out += len(inner).to_bytes(4, "little") + inner
    else:
        out += len(value).to_bytes(4, "little") + value + b"\0"


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


def _take_bytes(fields: dict[int, Value], code: int) -> bytes:
    value = fields.get(code, b"")
    return value if isinstance(value, bytes) else b""


class _Values:
    """Reads values of a message. `at`: how far. Invariant: `_left` more values may come."""

    def __init__(self, data: bytes, order: "ByteOrder") -> None:
        self.at = 0
        self._data = data
        self._order = order
        self._left = VALUES_MAX

    def take_all(self, signature: str) -> "Iterator[Value]":
        """The values of each type of the signature. Raises RemoteProtocolError."""
        for kind in split(signature):
            yield self._take(kind, 0)

    def _take(self, kind: str, depth: int) -> Value:
        self._left -= 1
        if self._left < 0 or depth > DEPTH_MAX:
            raise RemoteProtocolError("a D-Bus message has too many values")
        letter = kind[0]
        self._align(letter)
        if letter in _FIXED:
            return self._take_number(_FIXED[letter], is_signed=letter in _SIGNED)
        if letter in _STRINGS:
            return self._take_text(1 if letter == "g" else 4)
        if letter == "v":
            inner = split(self._take_text(1).decode("ascii", "replace"))
            if len(inner) != 1:
                raise RemoteProtocolError("a variant of D-Bus without one type")
            return self._take(inner[0], depth + 1)
        if letter == "a":
            return self._take_array(kind[1:], depth)
        return tuple(self._take(inner, depth + 1) for inner in split(kind[1:-1]))

    def _take_array(self, inner: str, depth: int) -> Value:
        size = self._take_number(4)
        self._align(inner[0])
        if inner == "y":
            return self._take_bytes(size)
        end = self.at + size
        if end > len(self._data):
            raise RemoteProtocolError("an array of D-Bus is longer than its message")
        found: list[Value] = []
        while self.at < end:
            found.append(self._take(inner, depth + 1))
        if self.at != end:
            raise RemoteProtocolError("an array of D-Bus is shorter than its values")
        # The key of an entry is text or a number.
        return dict(found) if inner[0] == "{" else found  # type: ignore[arg-type]  # pairs, by split()

    def _align(self, letter: str) -> None:
        alignment = _ALIGNMENT.get(letter, 4)
        self.at += -self.at % alignment

    def _take_number(self, size: int, *, is_signed: bool = False) -> int:
        return int.from_bytes(self._take_bytes(size), self._order, signed=is_signed)

    def _take_text(self, width: int) -> bytes:
        text = self._take_bytes(self._take_number(width) + 1)
        if text[-1:] != b"\0" or b"\0" in text[:-1]:
            raise RemoteProtocolError("a text of D-Bus has no end")
        return text[:-1]

    def _take_bytes(self, size: int) -> bytes:
        if self.at + size > len(self._data):
            raise RemoteProtocolError("a D-Bus message is shorter than its arguments")
        taken = self._data[self.at : self.at + size]
        self.at += size
        return taken


def split(signature: str) -> list[str]:
    """The types of a signature, each whole. Raises RemoteProtocolError."""
    if len(signature) > SIGNATURE_MAX:
        raise RemoteProtocolError("a signature of D-Bus is too long")
    found = []
    at = 0
    while at < len(signature):
        end = _find_end(signature, at, 0)
        found.append(signature[at:end])
        at = end
    return found


def _find_end(signature: str, at: int, depth: int) -> int:
    letter = signature[at : at + 1]
    if letter and (letter in _FIXED or letter in _STRINGS or letter == "v"):
        return at + 1
    if depth < DEPTH_MAX and letter == "a" and signature[at + 1 : at + 2] == "{":
        key = signature[at + 2 : at + 3]
        if key and (key in _FIXED or key in _STRINGS):
            end = _find_end(signature, at + 3, depth + 1)
            if signature[end : end + 1] == "}":
                return end + 1
    elif depth < DEPTH_MAX and letter == "a":
        return _find_end(signature, at + 1, depth + 1)
    elif depth < DEPTH_MAX and letter == "(":
        end = _find_end(signature, at + 1, depth + 1)
        while signature[end : end + 1] not in (")", ""):
            end = _find_end(signature, end, depth + 1)
        if signature[end : end + 1] == ")":
            return end + 1
    raise RemoteProtocolError("a D-Bus signature has an unknown type")
