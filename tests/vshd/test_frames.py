"""Frames: every split of every stream of bytes gives the same payloads and data."""

import random

import pytest

from vshd.wire.errors import LocalProtocolError, RemoteProtocolError
from vshd.wire.frames import (
    LEGACY_MAX_PAYLOAD,
    DataPiece,
    FrameReader,
    encode_data_head,
    encode_frame,
)
from vshd.wire.messages import DATA_MESSAGE, DataMessage, HostMessage


def read_all(reader: FrameReader, chunks: list[bytes]) -> list[bytes | tuple[int, bytes]]:
    """Everything the reader makes of the chunks, with neighbouring pieces of a stream joined."""
    found: list[bytes | tuple[int, bytes]] = []
    for chunk in chunks:
        view = memoryview(chunk)
        position = 0
        while True:
            position, piece = reader.receive(view, position)
            if piece is None:
                break
            if isinstance(piece, DataPiece):
                if found and isinstance(found[-1], tuple) and found[-1][0] == piece.stream:
                    found[-1] = (piece.stream, found[-1][1] + bytes(piece.data))
                else:
                    found.append((piece.stream, bytes(piece.data)))
            else:
                found.append(piece)
        assert position == len(view)
    return found


def data_frame(stream: int, data: bytes) -> bytes:
    return encode_data_head(stream, len(data)) + data


STREAM = (
    data_frame(2, b"hello")
    + encode_frame(b"", 4096)
    + data_frame(3, b"x" * 200)
    + encode_frame(bytes.fromhex("0a020801"), 4096)
    + encode_frame(bytes.fromhex("121d0802121974617267657420"), 4096)
    + data_frame(2, b"y" * 4000)
    + encode_frame(bytes.fromhex("0a051203616263"), 4096)  # data without a stream
    + encode_frame(bytes.fromhex("0a0712036162630801"), 4096)  # the stream behind the data
)
EXPECTED = [
    (2, b"hello"),
    b"",
    (3, b"x" * 200),
    bytes.fromhex("0a020801"),
    bytes.fromhex("121d0802121974617267657420"),
    (2, b"y" * 4000),
    bytes.fromhex("0a051203616263"),
    bytes.fromhex("0a0712036162630801"),
]


def make_reader(max_payload: int = LEGACY_MAX_PAYLOAD, splits_data: bool = True) -> FrameReader:
    reader = FrameReader(max_payload)
    reader.splits_data = splits_data
    return reader


def test_reader_whole() -> None:
    assert read_all(make_reader(), [STREAM]) == EXPECTED


def test_reader_byte_by_byte() -> None:
    reader = make_reader()
    assert read_all(reader, [STREAM[i : i + 1] for i in range(len(STREAM))]) == EXPECTED
    assert reader.is_between_frames


def test_reader_at_every_split() -> None:
    for split in range(len(STREAM)):
        assert read_all(make_reader(), [STREAM[:split], STREAM[split:]]) == EXPECTED


def test_reader_at_random_splits() -> None:
    rng = random.Random(1)
    for _ in range(200):
        cuts = sorted(rng.sample(range(len(STREAM)), rng.randrange(1, 12)))
        parts = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
        assert read_all(make_reader(), parts) == EXPECTED


def test_reader_collects_data_before_the_setup_is_over() -> None:
    reader = make_reader(splits_data=False)
    payload = HostMessage(DATA_MESSAGE, DataMessage(2, b"abc")).encode()
    assert read_all(reader, [encode_frame(payload, 4096)]) == [payload]


def test_data_head_is_what_the_codec_writes() -> None:
    for size in (1, 100, 127, 128, 4000, 16383, 16384, 262144, 1048576):
        data = b"d" * size
        payload = HostMessage(DATA_MESSAGE, DataMessage(3, data)).encode()
        assert data_frame(3, data) == len(payload).to_bytes(4, "little") + payload


@pytest.mark.parametrize("size", [LEGACY_MAX_PAYLOAD + 1, 0x4E4E4F43, 2**32 - 1])
def test_reader_refuses_a_length_over_the_limit(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"Message size of {size} exceeds max message size 4096"):
        make_reader().receive(memoryview(size.to_bytes(4, "little")), 0)


def test_reader_takes_a_length_at_the_limit() -> None:
    payload = b"\x12" + b"\x00" * (LEGACY_MAX_PAYLOAD - 1)
    assert read_all(make_reader(), [encode_frame(payload, LEGACY_MAX_PAYLOAD)]) == [payload]


def test_encoder_refuses_a_payload_over_the_limit() -> None:
    with pytest.raises(LocalProtocolError, match="Serialized message too large: 4097"):
        encode_frame(b"x" * 4097, 4096)


def test_reader_knows_when_it_is_inside_a_frame() -> None:
    reader = make_reader()
    for split in range(1, len(data_frame(2, b"hello"))):
        reader = make_reader()
        read_all(reader, [data_frame(2, b"hello")[:split]])
        assert not reader.is_between_frames
