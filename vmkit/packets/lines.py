"""Packets of vsock as lines for people and as JSON for programs. Pure."""

import json
import time
from typing import Final

from vmkit.vsock.packet import OP_SHUTDOWN, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Header, name_op
from vmkit.vsock.records import Captured
from vmkit.vsock.requests import TO_GUEST, TO_HOST

OP_NAMES: Final = {name_op(op).lower().replace("_", "-"): op for op in range(1, 8)}
_WIDTH: Final = max(map(len, OP_NAMES))


def name_direction(packet: Captured) -> str:
    """`to-host` or `to-guest`."""
    return TO_HOST if packet.is_from_guest else TO_GUEST


def render_line(packet: Captured) -> str:
    """A packet as one line. A gap is a line of its own, before the packet."""
    gap = f"{packet.dropped} packets are missing here: they came faster than they were read\n" if packet.dropped else ""
    header = packet.header
    if header is None:
        return gap.rstrip("\n")
    seconds, rest_ns = divmod(packet.time_ns, 10**9)
    clock = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest_ns // 1000:06}"
    addresses = f"{header.src_cid}:{header.src_port} > {header.dst_cid}:{header.dst_port}"
    return (
        f"{gap}{clock} {name_direction(packet):<{len(TO_GUEST)}} {_name(header):<{_WIDTH}} {addresses}"
        f" len={header.length} buf_alloc={header.buf_alloc} fwd_cnt={header.fwd_cnt} flags={_render_flags(header)}"
    )


def render_json(packet: Captured) -> str:
    """A packet as one line of JSON. A gap without a packet has `dropped` and `time_ns` alone."""
    value: dict[str, object] = {"time_ns": packet.time_ns, "dropped": packet.dropped}
    if packet.header is not None:
        fields = packet.header._asdict()
        value |= {"direction": name_direction(packet), "op": _name(packet.header)}
        value |= {name: fields[name] for name in ("src_cid", "src_port", "dst_cid", "dst_port", "length", "type")}
        value |= {name: fields[name] for name in ("flags", "buf_alloc", "fwd_cnt")}
        value["payload"] = packet.payload.hex()
    return json.dumps(value)


def _name(header: Header) -> str:
    return name_op(header.op).lower().replace("_", "-").replace(" ", "-")


def _render_flags(header: Header) -> str:
    if header.op != OP_SHUTDOWN or not header.flags:
        return str(header.flags)
    words = {SHUTDOWN_RECEIVE: "no-receive", SHUTDOWN_SEND: "no-send"}
    named = [word for bit, word in words.items() if header.flags & bit]
    rest = header.flags & ~sum(words)
    return ",".join([*named, *([str(rest)] if rest else [])])
