"""Capture files: read by a small reader of the test's own, and by tshark."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

from vmkit.packets.pcap import LINKTYPE_VSOCK, MAX_PACKET_BYTES, encode_file_header, encode_packet
from vmkit.vsock import packet as pk
from vmkit.vsock.packet import Header

TSHARK = shutil.which("tshark")
DEADLINE_S = 120
TIME_NS = 1_700_000_000_123_456_789


def make_header(op: int, length: int = 0, **fields: int) -> Header:
    return Header(2, 3, 1 << 30, 9001, length, pk.TYPE_STREAM, op, 0, 262144, 17)._replace(**fields)


PACKETS = [
    (make_header(pk.OP_REQUEST), b""),
    (make_header(pk.OP_RESPONSE, src_cid=3, dst_cid=2, src_port=9001, dst_port=1 << 30), b""),
    (make_header(pk.OP_RW, 5), b"hello"),
    (make_header(pk.OP_RW, 70_000), b"cut"),
    (make_header(pk.OP_CREDIT_UPDATE), b""),
    (make_header(pk.OP_CREDIT_REQUEST), b""),
    (make_header(pk.OP_SHUTDOWN, flags=3), b""),
    (make_header(pk.OP_RST), b""),
    (make_header(99), b""),
]
# enum af_vsockmon_op, linux/vsockmon.h: connect, disconnect, control, payload.
MONITOR_OPS = [1, 1, 4, 4, 3, 3, 2, 2, 0]


def write_capture() -> bytes:
    return encode_file_header() + b"".join(encode_packet(TIME_NS, header, payload) for header, payload in PACKETS)


def test_file_is_read_by_the_specification_alone() -> None:
    data = write_capture()
    assert struct.unpack_from("<IHHiIII", data) == (0xA1B23C4D, 2, 4, 0, 0, MAX_PACKET_BYTES, LINKTYPE_VSOCK)
    at = 24
    for (header, payload), op in zip(PACKETS, MONITOR_OPS, strict=True):
        seconds, rest_ns, kept, whole = struct.unpack_from("<IIII", data, at)
        assert seconds * 10**9 + rest_ns == TIME_NS
        assert (kept, whole) == (76 + len(payload), 76 + header.length)
        at += 16
        source, target = struct.unpack_from("<QQ", data, at)
        source_port, target_port = struct.unpack_from("<II", data, at + 16)
        assert (source, target, source_port, target_port) == header[:4]
        # The operation, the transport (virtio is 2), the length of its header, two bytes of zero.
        assert struct.unpack_from("<HHHH", data, at + 24) == (op, 2, 44, 0)
        assert data[at + 32 : at + 76] == header.encode()
        assert data[at + 76 : at + kept] == payload
        at += kept
    assert at == len(data)


def test_tshark_reads_the_fields(tmp_path: Path) -> None:
    assert TSHARK is not None, "the package tshark is missing: make test-packages"
    path = tmp_path / "vsock.pcap"
    path.write_bytes(write_capture())
    argv = [TSHARK, "-r", str(path), "-T", "json", "--no-duplicate-keys"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    layers = [packet["_source"]["layers"] for packet in json.loads(done.stdout)]
    assert len(layers) == len(PACKETS)
    for layer, (header, _payload), op in zip(layers, PACKETS, MONITOR_OPS, strict=True):
        assert "vsock" in layer["frame"]["frame.protocols"]
        fields = layer["vsock"]
        assert int(fields["vsock.src_cid"]) == header.src_cid
        assert int(fields["vsock.dst_cid"]) == header.dst_cid
        assert int(fields["vsock.src_port"]) == header.src_port
        assert int(fields["vsock.dst_port"]) == header.dst_port
        assert int(fields["vsock.op"]) == op
        virtio = fields["Virtio transport header"]
        assert int(virtio["vsock.virtio.op"]) == header.op
        assert int(virtio["vsock.virtio.buf_alloc"]) == header.buf_alloc
        assert int(virtio["vsock.virtio.fwd_cnt"]) == header.fwd_cnt
        assert int(virtio["vsock.virtio.len"]) == header.length
