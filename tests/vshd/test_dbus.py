"""D-Bus: values of every type come as they were sent, and every limit holds."""

import struct

import pytest

from tests.vshd.private_bus import make_answer, make_signal, pack_all
from vshd.wire import dbus
from vshd.wire.dbus import BusClient, BusMessage, encode_message, split
from vshd.wire.errors import RemoteProtocolError

LET_IN = b"OK 0123\r\n"


def receive(data: bytes, wanted: bytes = b"") -> list[BusMessage]:
    client = BusClient(0, wanted)
    return list(client.receive(LET_IN + data))


def read(signature: str, body: bytes) -> list[object]:
    fields = ((dbus.PATH, b"/"),)
    (message,) = receive(encode_message(dbus.SIGNAL, 1, fields, body=body, signature=signature))
    return message.read()


@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ("", []),
        ("ybiuxt", [255, 1, -5, 7, -9, 1 << 63]),
        ("sog", [b"text", b"/a/b", b"a{sv}"]),
        ("yt", [1, 2]),
        ("as", [[b"one", b"", b"three"]]),
        ("at", [[]]),
        ("ya(yt)", [1, [(1, 2), (3, 4)]]),
        ("ay", [b"bytes"]),
        ("aai", [[[1], [], [2, 3]]]),
        ("(s(ii))", [(b"a", (1, 2))]),
        ("a{ua{ss}}", [{1: {b"a": b"b"}, 2: {}}]),
    ],
)
def test_values_come_as_they_were_sent(signature: str, values: list[object]) -> None:
    assert read(signature, pack_all(signature, *values)) == values


def test_variant_is_its_value() -> None:
    body = pack_all("a{sv}v", {b"a": ("u", 1), b"b": ("as", [b"x"])}, ("v", ("x", -1)))
    assert read("a{sv}v", body) == [{b"a": 1, b"b": [b"x"]}, -1]


def test_message_of_the_other_byte_order_is_read() -> None:
    fields = struct.pack(">BB", dbus.REPLY_TO, 1) + b"u\0" + struct.pack(">I", 7)
    fields += struct.pack(">BB", dbus.SIGNATURE, 1) + b"g\0\1u\0"
    head = struct.pack(">BBBBIII", ord("B"), dbus.RETURN, 0, 1, 4, 1, len(fields)) + fields
    (message,) = receive(head + bytes(-len(head) % 8) + struct.pack(">I", 9))
    assert (message.kind, message.reply_to, message.read()) == (dbus.RETURN, 7, [9])


def test_call_is_what_the_specification_says() -> None:
    client = BusClient(1000)
    assert client.outgoing == b"\0AUTH EXTERNAL 31303030\r\n"
    assert list(client.receive(LET_IN)) == []
    client.outgoing = b""
    assert client.call("/a", "b.c", "D", b"x", [b"y", b"zz"]) == 1
    assert client.call("/a", "b.c", "D") == 2
    first, second = receive(client.outgoing)
    assert (first.kind, first.path, first.interface, first.member) == (dbus.CALL, b"/a", b"b.c", b"D")
    assert (first.signature, first.read()) == ("sas", [b"x", [b"y", b"zz"]])
    assert second.read() == []


def test_signals_that_lack_a_word_are_left_out() -> None:
    data = make_signal("/one", "M", "s", b"a") + make_signal("/two", "M", "s", b"b") + make_answer(1, "s", b"c")
    assert [message.read() for message in receive(data, b"/two")] == [[b"b"], [b"c"]]


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("u", b"\1\0\0"),
        ("u", bytes(8)),
        ("s", struct.pack("<I", 1 << 31) + b"x\0"),
        ("s", struct.pack("<I", 1) + b"xy"),
        ("s", struct.pack("<I", 2) + b"\0x\0"),
        ("as", struct.pack("<I", 6) + struct.pack("<I", 4) + b"text\0"),
        ("as", struct.pack("<I", 100)),
        ("ay", struct.pack("<I", 100)),
        ("v", b"\0\0"),
        ("v", b"\2ii\0" + bytes(8)),
        ("v", b"\1v\0" * 40),
        ("ai", struct.pack("<I", 1 << 19) + bytes(1 << 19)),
    ],
)
def test_bad_arguments_are_an_error(signature: str, body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read(signature, body)


@pytest.mark.parametrize(
    "signature", ["()", "a", "{su}", "a{vs}", "a{s}", "a{sss}", "(i", "z", "a" * 40, "(" * 40, "i" * 256]
)
def test_bad_signature_is_an_error(signature: str) -> None:
    with pytest.raises(RemoteProtocolError):
        split(signature)


def test_message_beyond_the_limit_is_refused_before_it_has_come() -> None:
    for size in (dbus.MESSAGE_MAX, (1 << 32) - 1):
        with pytest.raises(RemoteProtocolError, match="a D-Bus message of"):
            receive(struct.pack("<BBBBIII", ord("l"), 1, 0, 1, 0, 1, size))
    with pytest.raises(RemoteProtocolError, match="unknown beginning"):
        receive(b"GET / HTTP/1.1\r\n")
    with pytest.raises(RemoteProtocolError, match="too long"):
        list(BusClient(0).receive(b"x" * 300))


def test_field_of_another_type_is_refused() -> None:
    data = encode_message(dbus.SIGNAL, 1, ((dbus.PATH, b"/a"),)).replace(b"\1\1o\0", b"\5\1o\0")
    with pytest.raises(RemoteProtocolError, match="field 5"):
        receive(data)
