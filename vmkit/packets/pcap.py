"""Packets of vsock as a capture file that Wireshark and tcpdump read: values to bytes. Pure.

The link type is LINKTYPE_VSOCK (271): the header of the kernel's vsockmon device, the header of the transport, and the
payload. Specification: struct af_vsockmon_hdr, linux/vsockmon.h; the file format is draft-ietf-opsawg-pcap with times
in ns.
"""

import struct
from typing import Final

from vmkit.vsock.packet import (
    HEADER_SIZE,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    Header,
)
from vmkit.vsock.requests import MAX_SNAPLEN_BYTES

LINKTYPE_VSOCK: Final = 271
_MAGIC_NS: Final = 0xA1B23C4D
_FILE: Final = struct.Struct("<IHHiIII")
_PACKET: Final = struct.Struct("<IIII")
# src_cid, dst_cid, src_port, dst_port, op, transport, length of the transport's header, two bytes of zero.
VSOCKMON: Final = struct.Struct("<QQIIHHH2x")
# enum af_vsockmon_op and enum af_vsockmon_transport, linux/vsockmon.h.
_OP_UNKNOWN: Final = 0
_OPS: Final = {
    OP_REQUEST: 1,
    OP_RESPONSE: 1,
    OP_RST: 2,
    OP_SHUTDOWN: 2,
    OP_CREDIT_UPDATE: 3,
    OP_CREDIT_REQUEST: 3,
    OP_RW: 4,
}
_TRANSPORT_VIRTIO: Final = 2
MAX_PACKET_BYTES: Final = VSOCKMON.size + HEADER_SIZE + MAX_SNAPLEN_BYTES


def encode_file_header() -> bytes:
    """The first bytes of a capture file."""
    return _FILE.pack(_MAGIC_NS, 2, 4, 0, 0, MAX_PACKET_BYTES, LINKTYPE_VSOCK)


def encode_packet(time_ns: int, header: Header, payload: bytes) -> bytes:
    """One packet of a capture file. payload: its first bytes, all or fewer than the header names."""
    monitor = VSOCKMON.pack(
        header.src_cid,
        header.dst_cid,
        header.src_port,
        header.dst_port,
        _OPS.get(header.op, _OP_UNKNOWN),
        _TRANSPORT_VIRTIO,
        HEADER_SIZE,
    )
    body = monitor + header.encode() + payload
    whole_bytes = VSOCKMON.size + HEADER_SIZE + max(header.length, len(payload))
    seconds, rest_ns = divmod(time_ns, 10**9)
    return _PACKET.pack(seconds & 0xFFFFFFFF, rest_ns, len(body), whole_bytes) + body
