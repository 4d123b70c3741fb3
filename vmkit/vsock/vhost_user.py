"""The messages of vhost-user to and from the front-end (QEMU), with descriptors that travel beside them.

Bytes and descriptors in, messages out; device.py acts on them. Specification: QEMU's docs/interop/vhost-user.rst. All
integers are little endian, as the host's are (checked at start).
"""

import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from vmkit.vsock.memory import MAX_REGIONS, RegionSpec

GET_FEATURES: Final = 1
SET_FEATURES: Final = 2
SET_OWNER: Final = 3
RESET_OWNER: Final = 4
SET_MEM_TABLE: Final = 5
SET_VRING_NUM: Final = 8
SET_VRING_ADDR: Final = 9
SET_VRING_BASE: Final = 10
GET_VRING_BASE: Final = 11
SET_VRING_KICK: Final = 12
SET_VRING_CALL: Final = 13
SET_VRING_ERR: Final = 14
GET_PROTOCOL_FEATURES: Final = 15
SET_PROTOCOL_FEATURES: Final = 16
GET_QUEUE_NUM: Final = 17
SET_VRING_ENABLE: Final = 18
GET_CONFIG: Final = 24
SET_CONFIG: Final = 25
RESET_DEVICE: Final = 34

_VERSION: Final = 1
_VERSION_MASK: Final = 3
_FLAG_REPLY: Final = 4
_FLAG_NEED_REPLY: Final = 8

HEADER: Final = struct.Struct("<III")
_U64: Final = struct.Struct("<Q")
_VRING_STATE: Final = struct.Struct("<II")
_VRING_ADDRESS: Final = struct.Struct("<IIQQQQ")
_TABLE: Final = struct.Struct("<II")
_REGION: Final = struct.Struct("<QQQQ")
_CONFIG: Final = struct.Struct("<III")

# The largest message we understand is a table of memory regions; the specification's largest payloads stay below a
# page.
MAX_PAYLOAD_BYTES: Final = 4096
MAX_FDS: Final = MAX_REGIONS
_FD_SIZE: Final = struct.calcsize("i")
_FDS_SPACE: Final = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)
_VRING_INDEX_MASK: Final = 0xFF
_VRING_NO_FD: Final = 0x100


class VhostUserError(Exception):
    """The stream of messages is broken, so that the start of the next one is unknown. The text names the fault."""


class RefusedMessageError(Exception):
    """A whole message asks for something impossible, which the text names. The device refuses it and goes on."""


class VhostUserMessage:
    """One message. A caller that takes a descriptor out of `fds` owns it; close() closes those that are left."""

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds

    @property
    def needs_reply(self) -> bool:
        """Whether the front-end waits for a status although this kind of message has no reply of its own."""
        return bool(self.flags & _FLAG_NEED_REPLY)

    def take_fd(self) -> int:
        """Takes the one descriptor that belongs to this message. Raises RefusedError."""
        if len(self.fds) != 1:
            raise RefusedMessageError(f"message {self.request} with {len(self.fds)} descriptors instead of one")
        return self.fds.pop()

    def close(self) -> None:
        """Closes the descriptors that were not taken."""
        while self.fds:
            os.close(self.fds.pop())


class Decoder:
    """Puts messages together from a stream.

    It never asks for more than the rest of the current message. So descriptors cannot be mistaken for those of the
    message before.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[int] = []

    @property
    def is_within_message(self) -> bool:
        """Whether a message has begun and is not complete."""
        return bool(self._data)

    def wanted_bytes(self) -> int:
        """Returns how many bytes to read at most."""
        if len(self._data) < HEADER.size:
            return HEADER.size - len(self._data)
        return HEADER.size + self._payload_size() - len(self._data)

    def feed(self, data: bytes, fds: list[int]) -> VhostUserMessage | None:
        """Takes at most wanted_bytes() of new bytes, and their descriptors; returns the message when complete."""
        self._data += data
        self._fds += fds
        if len(self._fds) > MAX_FDS:
            raise VhostUserError(f"{len(self._fds)} descriptors in one message")
        if len(self._data) < HEADER.size or self.wanted_bytes():
            return None
        request, flags, _ = HEADER.unpack_from(self._data)
        message = VhostUserMessage(request, flags, bytes(self._data[HEADER.size :]), self._fds)
        self._data.clear()
        self._fds = []
        return message

    def close(self) -> None:
        """Closes the descriptors of an incomplete message."""
        while self._fds:
            os.close(self._fds.pop())

    def _payload_size(self) -> int:
        request, flags, size = HEADER.unpack_from(self._data)
        if flags & _VERSION_MASK != _VERSION or flags & _FLAG_REPLY:
            raise VhostUserError(f"message {request} with flags {flags:#x}")
        if size > MAX_PAYLOAD_BYTES:
            raise VhostUserError(f"message {request} of {size} bytes")
        return int(size)


# Takes at most so many bytes; returns them, and the descriptors beside them.
ReadPiece = Callable[[int], tuple[bytes, list[int]]]


def receive_message(
    sock: socket.socket, decoder: Decoder, read_piece: ReadPiece | None = None
) -> VhostUserMessage | None:
    """Returns the next message of a non-blocking socket, or None when none is complete yet.

    read_piece: takes the socket's next bytes, in the place of receive_piece().

    Raises EOFError when the front-end left between messages. Raises VhostUserError when it left within one, or broke
    the protocol.
    """
    read_piece = read_piece or partial(receive_piece, sock)
    while True:
        try:
            data, fds = read_piece(decoder.wanted_bytes())
        except BlockingIOError:
            return None
        except ConnectionError as error:
            # Unread replies of ours make a closed front-end look like this; it has left all the same.
            raise EOFError from error
        message = decoder.feed(data, fds)
        if message is not None:
            return message
        if not data:
            if decoder.is_within_message:
                raise VhostUserError("the front-end left in the middle of a message")
            raise EOFError


def receive_piece(sock: socket.socket, size_bytes: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Returns the next bytes, at most size_bytes, and the descriptors beside them. Raises OSError, VhostUserError."""
    data, ancillary, found, _ = sock.recvmsg(size_bytes, _FDS_SPACE, flags | socket.MSG_CMSG_CLOEXEC)
    fds = _parse_fds(ancillary)
    if found & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise VhostUserError("more descriptors than a message may have")
    return data, fds


def _parse_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Returns the descriptors beside a message. (socket.recv_fds does this, but forgets its flags.)"""
    fds: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += struct.unpack(f"{len(data) // _FD_SIZE}i", data[: len(data) // _FD_SIZE * _FD_SIZE])
    return fds


# Payloads. Raises RefusedError where a payload is too short, or holds numbers that cannot be.


def parse_u64(payload: bytes) -> int:
    """Reads the one number of a payload."""
    return int(_unpack(_U64, payload)[0])


class VringState(NamedTuple):
    """A ring's index and one number: its size, base, or whether it is enabled."""

    ring: int
    number: int


def parse_vring_state(payload: bytes) -> VringState:
    """Reads the payload of SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE."""
    return VringState(*_unpack(_VRING_STATE, payload))


class VringAddress(NamedTuple):
    """The place of a ring, in addresses of the front-end."""

    ring: int
    desc: int
    avail: int
    used: int


def parse_vring_address(payload: bytes) -> VringAddress:
    """Reads the payload of SET_VRING_ADDR. On the wire the used ring comes before the available one."""
    index, _flags, desc, used, avail, _log = _unpack(_VRING_ADDRESS, payload)
    return VringAddress(index, desc, avail, used)


def parse_vring_fd(payload: bytes) -> tuple[int, bool]:
    """Reads the payload of SET_VRING_KICK, _CALL and _ERR: ring index, and whether a descriptor comes with it."""
    number = parse_u64(payload)
    return number & _VRING_INDEX_MASK, not number & _VRING_NO_FD


def parse_memory_table(payload: bytes) -> list[RegionSpec]:
    """Reads the payload of SET_MEM_TABLE."""
    count, _padding = _unpack(_TABLE, payload[: _TABLE.size])
    entries = payload[_TABLE.size :]
    if count > MAX_REGIONS or len(entries) < count * _REGION.size:
        raise RefusedMessageError(f"a table of {count} memory regions in {len(payload)} bytes")
    return [RegionSpec(*fields) for fields in _REGION.iter_unpack(entries[: count * _REGION.size])]


def render_config_reply(payload: bytes, config: bytes) -> bytes:
    """Returns the payload of the reply to GET_CONFIG: the request repeated, its bytes filled in.

    Bytes past the end of `config` are 0.
    """
    offset, size, flags = _unpack(_CONFIG, payload[: _CONFIG.size])
    if size > MAX_PAYLOAD_BYTES - _CONFIG.size:
        raise RefusedMessageError(f"{size} bytes of configuration asked for")
    return _CONFIG.pack(offset, size, flags) + config[offset : offset + size].ljust(size, b"\0")


def render_vring_state(index: int, number: int) -> bytes:
    """Returns the payload of the reply to GET_VRING_BASE."""
    return _VRING_STATE.pack(index, number)


def render_u64(number: int) -> bytes:
    """Returns the payload of most replies."""
    return _U64.pack(number)


def render_reply(request: int, payload: bytes) -> bytes:
    """Returns a whole reply."""
    return HEADER.pack(request, _VERSION | _FLAG_REPLY, len(payload)) + payload


def _unpack(shape: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < shape.size:
        raise RefusedMessageError(f"a payload of {len(payload)} bytes where {shape.size} belong")
    return shape.unpack_from(payload)
