"""The part of proto3's wire format that the vsh messages need, driven by a table of fields per message.

Owns varints, tags and the rules every proto3 parser shares: unknown fields are skipped, the last scalar wins, repeated
sub-messages merge, a field of the wrong wire type counts as unknown. Knows no message by name.
"""

from vshd.wire.errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Field kinds.
INT32, SINT32, UINT32, UINT64, BOOL, BYTES, BYTES_LIST, BYTES_MAP, MESSAGE = range(9)

# Wire types.
VARINT, FIXED64, LENGTH, GROUP_START, GROUP_END, FIXED32 = range(6)

VARINT_BYTES_MAX = 10
TAG_MAX = (1 << 32) - 1
# As deep as protobuf itself goes into unknown groups.
GROUP_DEPTH_MAX = 100
# Every field becomes an object. Linux takes at most 700,000 words and variables: 9 bytes each of 6 MiB (execve(2)).
FIELDS_MAX = 1 << 20

_UINT32 = (1 << 32) - 1
_UINT64 = (1 << 64) - 1
_WIRE_TYPE = (VARINT, VARINT, VARINT, VARINT, VARINT, LENGTH, LENGTH, LENGTH, LENGTH)


class Field:
    """One row of a message's table."""

    __slots__ = ("kind", "message", "name", "number", "wire_type")

    def __init__(self, number: int, name: str, kind: int, message: "type[Message] | None" = None) -> None:
        self.number = number
        self.name = name
        self.kind = kind
        self.message = message
        self.wire_type = _WIRE_TYPE[kind]


class _Fielded:
    """What both kinds of message share: the fields of the class, in order and by number."""

    __slots__ = ()

    FIELDS: tuple[Field, ...] = ()
    BY_NUMBER: "dict[int, Field]"

    def __init_subclass__(cls) -> None:
        cls.BY_NUMBER = {field.number: field for field in cls.FIELDS}


class Message(_Fielded):
    """A message whose fields are attributes; a default value is not written, and nothing read leaves the default."""

    __slots__ = ()

    def encode(self) -> bytes:
        """The message's bytes, fields in ascending order, map entries in the order they were made."""
        out = bytearray()
        for field in self.FIELDS:
            value = getattr(self, field.name)
            if value or (field.kind == MESSAGE and value is not None):
                _write_field(out, field, value)
        return bytes(out)

    def merge(self, data: bytes) -> None:
        """Reads `data` into this message. Raises RemoteProtocolError when it is not proto3."""
        table = self.BY_NUMBER
        for number, wire_type, value in read_fields(data):
            field = table.get(number)
            if field is not None and field.wire_type == wire_type:
                self._set(field, value)

    def _set(self, field: Field, value: int | bytes) -> None:
        current = getattr(self, field.name)
        if isinstance(value, int):
            setattr(self, field.name, _from_varint(field.kind, value))
        elif field.kind == BYTES:
            setattr(self, field.name, value)
        elif field.kind == BYTES_LIST:
            current.append(value)
        elif field.kind == BYTES_MAP:
            entry = _MapEntry()
            entry.merge(value)
            current[entry.key] = entry.value
        else:
            if current is None:
                assert field.message is not None
                current = field.message()
                setattr(self, field.name, current)
            current.merge(value)


class Oneof(_Fielded):
    """A message that is one `oneof`: the number of the member that is set (0: none) and its value."""

    __slots__ = ("member", "value")

    def __init__(self, member: int = 0, value: "Message | int | bytes | None" = None) -> None:
        self.member = member
        self.value = value

    def encode(self) -> bytes:
        out = bytearray()
        field = self.BY_NUMBER.get(self.member)
        if field is not None:
            _write_field(out, field, self.value)
        return bytes(out)

    def merge(self, data: bytes) -> None:
        """Reads `data`: the last member wins, and a sub-message met twice in a row of the same member merges."""
        table = self.BY_NUMBER
        for number, wire_type, value in read_fields(data):
            field = table.get(number)
            if field is None or field.wire_type != wire_type:
                continue
            if isinstance(value, int):
                self.value = _from_varint(field.kind, value)
            elif field.message is None:
                self.value = value
            else:
                if self.member != number or not isinstance(self.value, Message):
                    self.value = field.message()
                self.value.merge(value)
            self.member = number


class _MapEntry(Message):
    __slots__ = ("key", "value")

    FIELDS = (Field(1, "key", BYTES), Field(2, "value", BYTES))

    def __init__(self, key: bytes = b"", value: bytes = b"") -> None:
        self.key = key
        self.value = value

    def encode(self) -> bytes:
        """Map entries always carry both fields, as protobuf writes them."""
        out = bytearray()
        _write_field(out, self.FIELDS[0], self.key)
        _write_field(out, self.FIELDS[1], self.value)
        return bytes(out)


def append_varint(out: bytearray, value: int) -> None:
    """Appends an unsigned number of at most 64 bits."""
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position` (its low 64 bits, as protobuf reads it) and the position behind it."""
    result = 0
    for index in range(VARINT_BYTES_MAX):
        if position >= len(data):
            raise RemoteProtocolError("a message ends inside a number")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result & _UINT64, position
    raise RemoteProtocolError("a message holds a number of more than 10 bytes")


def read_fields(data: bytes) -> "Iterator[tuple[int, int, int | bytes]]":
    """Every field of a message as (number, wire type, value); groups are skipped.

    Raises RemoteProtocolError in the course of it.
    """
    position = 0
    count = 0
    while position < len(data):
        count += 1
        if count > FIELDS_MAX:
            raise RemoteProtocolError(f"a message holds more than {FIELDS_MAX} fields")
        number, wire_type, position = _read_tag(data, position)
        if wire_type == VARINT:
            value, position = read_varint(data, position)
            yield number, wire_type, value
        elif wire_type == LENGTH:
            size, position = read_varint(data, position)
            end = position + size
            if end > len(data):
                raise RemoteProtocolError("a message ends inside a field")
            yield number, wire_type, data[position:end]
            position = end
        else:
            position = _skip(data, position, number, wire_type)


def _read_tag(data: bytes, position: int) -> tuple[int, int, int]:
    tag, position = read_varint(data, position)
    if tag > TAG_MAX or tag >> 3 == 0:
        raise RemoteProtocolError("a message holds an impossible field number")
    return tag >> 3, tag & 7, position


def _skip(data: bytes, position: int, number: int, wire_type: int) -> int:
    """The position behind a field of a wire type that no message of ours uses."""
    open_groups: list[int] = []
    while True:
        if wire_type == VARINT:
            _, position = read_varint(data, position)
        elif wire_type == FIXED64:
            position += 8
        elif wire_type == FIXED32:
            position += 4
        elif wire_type == LENGTH:
            size, position = read_varint(data, position)
            position += size
        elif wire_type == GROUP_START and len(open_groups) < GROUP_DEPTH_MAX:
            open_groups.append(number)
        elif wire_type == GROUP_END and open_groups and open_groups[-1] == number:
            open_groups.pop()
        else:
            raise RemoteProtocolError("a message holds an impossible field")
        if position > len(data):
            raise RemoteProtocolError("a message ends inside a field")
        if not open_groups:
            return position
        number, wire_type, position = _read_tag(data, position)


def _from_varint(kind: int, value: int) -> int | bool:
    if kind == BOOL:
        return value != 0
    if kind == UINT64:
        return value
    value &= _UINT32
    if kind == SINT32:
        return value >> 1 ^ -(value & 1)
    if kind == INT32 and value >> 31:
        return value - (1 << 32)
    return value


def _to_varint(kind: int, value: int) -> int:
    if kind == SINT32:
        return (value << 1 ^ value >> 31) & _UINT32
    return value & _UINT64


def _write_field(out: bytearray, field: Field, value: object) -> None:
    tag = field.number << 3 | field.wire_type
    if isinstance(value, int):
        append_varint(out, tag)
        append_varint(out, _to_varint(field.kind, value))
    elif isinstance(value, list):
        for item in value:
            _write_bytes(out, tag, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _write_bytes(out, tag, _MapEntry(key, item).encode())
    elif isinstance(value, Message):
        _write_bytes(out, tag, value.encode())
    else:
        assert isinstance(value, bytes)
        _write_bytes(out, tag, value)


def _write_bytes(out: bytearray, tag: int, value: bytes) -> None:
    append_varint(out, tag)
    append_varint(out, len(value))
    out += value
