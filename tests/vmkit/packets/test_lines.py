"""Packets as lines for people and as JSON."""

import json
import os
import time
from collections.abc import Iterator

import pytest

from vmkit.packets.lines import OP_NAMES, render_json, render_line
from vmkit.vsock import packet as pk
from vmkit.vsock.packet import Header
from vmkit.vsock.records import Captured

HEADER = Header(3, 2, 1025, 600, 5, pk.TYPE_STREAM, pk.OP_RW, 0, 262144, 17)
PACKET = Captured(1_700_000_000_123_456_789, True, HEADER, b"hel", 0)


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def test_line_has_one_packet() -> None:
    assert render_line(PACKET) == (
        "22:13:20.123456 to-host  rw             3:1025 > 2:600 len=5 buf_alloc=262144 fwd_cnt=17 flags=0"
    )


def test_line_names_what_a_shutdown_ends() -> None:
    for flags, words in ((0, "0"), (1, "no-receive"), (2, "no-send"), (3, "no-receive,no-send"), (6, "no-send,4")):
        packet = PACKET._replace(header=HEADER._replace(op=pk.OP_SHUTDOWN, flags=flags))
        assert render_line(packet).endswith(f"flags={words}")


def test_line_reports_what_is_missing_first() -> None:
    first, second = render_line(PACKET._replace(dropped=3)).splitlines()
    assert first.startswith("3 packets are missing")
    assert second == render_line(PACKET)
    assert render_line(Captured(1, False, None, b"", 3)) == first


def test_json_has_every_field() -> None:
    assert json.loads(render_json(PACKET)) == {
        "time_ns": 1_700_000_000_123_456_789,
        "dropped": 0,
        "direction": "to-host",
        "op": "rw",
        "src_cid": 3,
        "src_port": 1025,
        "dst_cid": 2,
        "dst_port": 600,
        "length": 5,
        "type": 1,
        "flags": 0,
        "buf_alloc": 262144,
        "fwd_cnt": 17,
        "payload": "68656c",
    }
    assert json.loads(render_json(Captured(1, False, None, b"", 3))) == {"time_ns": 1, "dropped": 3}


def test_operations_have_names_for_filters() -> None:
    assert OP_NAMES["request"] == pk.OP_REQUEST
    assert OP_NAMES["credit-update"] == pk.OP_CREDIT_UPDATE
    assert len(OP_NAMES) == 7
