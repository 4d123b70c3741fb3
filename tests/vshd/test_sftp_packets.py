"""SFTP's packets: cut out of any pieces, read to their end and no further, and within their limits."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vshd.sftp_peer import Answer, text, u32, u64
from vshd.services.sftp import packets
from vshd.services.sftp.packets import BUFFER_SIZE, DATA_MAX, PACKET_MAX, Attributes, Fields, PacketError, Splitter


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    """The packets of a stream that comes in pieces of these sizes, and then as it likes."""
    splitter, found = Splitter(), []
    pieces = iter(sizes)
    while stream:
        size = min(next(pieces, BUFFER_SIZE), len(stream), len(splitter.room()))
        assert size, "no room for the rest of a packet"
        splitter.room()[:size] = stream[:size]
        splitter.received(size)
        stream = stream[size:]
        found += [bytes(packet) for packet in splitter.packets()]
    return found


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.lists(st.integers(1, 50)))
def test_packets_come_out_of_any_pieces(bodies: list[bytes], sizes: list[int]) -> None:
    assert cut(b"".join(text(body) for body in bodies), sizes) == bodies


@pytest.mark.parametrize("step", [1000, 65536, 208 * 1024, BUFFER_SIZE])
def test_largest_packets_come_out_of_any_pieces(step: int) -> None:
    bodies = [bytes([number]) * size for number, size in enumerate((PACKET_MAX, 5, PACKET_MAX - 1, PACKET_MAX) * 3)]
    assert cut(b"".join(text(body) for body in bodies), [step] * 100_000) == bodies


@pytest.mark.parametrize("size", [0, PACKET_MAX + 1, (1 << 32) - 1])
def test_length_that_no_packet_has_is_an_error(size: int) -> None:
    with pytest.raises(PacketError, match=f"a packet of {size} bytes"):
        cut(u32(5) + bytes(5) + u32(size), [])


def test_announced_data_fits_a_packet() -> None:
    assert DATA_MAX + packets.DATA_HEAD_SIZE < PACKET_MAX


FIELD = st.one_of(
    st.tuples(st.just("int32"), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("int64"), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("string"), st.binary(max_size=50)),
)
ENCODERS = {"int32": u32, "int64": u64, "string": text}


@given(st.lists(FIELD, min_size=1), st.data())
def test_fields_are_read_to_their_end_and_no_further(fields: list[tuple[str, object]], data: st.DataObject) -> None:
    encoded = b"".join(ENCODERS[kind](value) for kind, value in fields)  # type: ignore[operator]  # kinds match
    reader = Fields(memoryview(encoded))
    assert [getattr(reader, kind)() for kind, _ in fields] == [value for _, value in fields]
    with pytest.raises(PacketError):
        reader.int32()
    cut_off = Fields(memoryview(encoded[: data.draw(st.integers(0, len(encoded) - 1))]))
    with pytest.raises(PacketError):
        for kind, _ in fields:
            getattr(cut_off, kind)()


@given(st.binary(max_size=60))
def test_any_bytes_are_attributes_or_an_error(data: bytes) -> None:
    try:
        found = Fields(memoryview(data)).attributes()
    except PacketError:
        return
    assert isinstance(found, Attributes)


def test_extended_attributes_are_skipped_up_to_a_limit() -> None:
    pair = text(b"acl@example.org") + text(b"value")
    reader = Fields(memoryview(u32(1 << 31 | 4) + u32(0o644) + u32(2) + 2 * pair + u32(7)))
    assert reader.attributes().mode == 0o644
    assert reader.int32() == 7
    with pytest.raises(PacketError, match="65 extended attributes"):
        Fields(memoryview(u32(1 << 31) + u32(65) + 65 * pair)).attributes()


@pytest.mark.parametrize("handle", [bytes(4), b"abcd", b"", b"abc", b"abcde"])
def test_transfer_reads_a_handle_of_any_size(handle: bytes) -> None:
    reader = Fields(memoryview(text(handle) + u64(5) + u32(6)))
    assert reader.transfer() == (struct.unpack(">I", handle)[0] if len(handle) == 4 else -1, 5, 6)


def test_times_have_32_bits() -> None:
    answer = Answer(bytes(5) + packets.render_attributes(1, 2, 3, 4, -1, 1 << 33 | 9))
    assert answer.attributes() == {"size": 1, "uid": 2, "gid": 3, "mode": 4, "atime": (1 << 32) - 1, "mtime": 9}


@pytest.mark.parametrize("packet", [b"", b"\x01", b"\x03\0\0\0"])
def test_packet_without_an_id_is_an_error(packet: bytes) -> None:
    with pytest.raises(PacketError):
        packets.take_head(memoryview(packet))
