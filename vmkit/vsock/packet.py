"""The 44-byte header of a virtio-vsock packet: its layout and its constants. Knows no rings, connections or sockets.

Specification: virtio 1.2, section 5.10.6 (struct virtio_vsock_hdr), little endian, packed.
"""

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = HEADER.size  # 44

HOST_CID: Final = 2  # VMADDR_CID_HOST, linux/vm_sockets.h
MIN_GUEST_CID: Final = 3
MAX_GUEST_CID: Final = 2**32 - 2  # 2**32 - 1 is VMADDR_CID_ANY

TYPE_STREAM: Final = (
    1  # VIRTIO_VSOCK_TYPE_STREAM; 2 is seqpacket, which needs a feature bit that this device never offers
)

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

# Flags of OP_SHUTDOWN; they accumulate over the life of a connection.
SHUTDOWN_RECEIVE: Final = 1  # the sender will receive no more
SHUTDOWN_SEND: Final = 2  # the sender will send no more
SHUTDOWN_BOTH: Final = SHUTDOWN_RECEIVE | SHUTDOWN_SEND

_OP_NAMES: Final = ("INVALID", "REQUEST", "RESPONSE", "RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST")


class Header(NamedTuple):
    """One header, field by field in wire order; `length` is the payload's size in bytes."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def encode(self) -> bytes:
        """Returns the 44 bytes of this header."""
        return HEADER.pack(*self)


_new_header: Final[Callable[[type[Header], tuple[int, ...]], Header]] = tuple.__new__


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Reads the header at the start of `data`, which holds at least HEADER_SIZE bytes.

    Any 44 bytes are a header of some kind.
    """
    # Header._make would count the fields again, for every packet.
    return _new_header(Header, HEADER.unpack_from(data))


def name_op(op: int) -> str:
    """Returns the name of an operation, also of one that does not exist."""
    return _OP_NAMES[op] if op < len(_OP_NAMES) else f"op {op}"
