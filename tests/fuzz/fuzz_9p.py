"""Fuzzes the 9P server of shared folders: any bytes give answers or the end of the share, and nothing outside changes.

The file system is real: a folder that is thrown away, beside one that must stay as it is. Longer than under pytest:
python -m tests.fuzz.fuzz_9p --cases 1000000 --seed 1
"""

import os
import random
import struct
from pathlib import Path

from tests.fuzz.fuzz_fuse import LARGE, NAMES, NUMBERS, in_folder
from tests.fuzz.seeded import run_program
from vmkit.ninep.messages import HEAD_SIZE, MSIZE_MAX, NO_FID, SHAPES, VERSION, NineKind, NineMessages
from vmkit.ninep.server import NineSpeaker
from vmkit.shares.cutter import MountFailedError, ProtocolError

MESSAGES_MAX = 40
FIDS = (1, 2, 3, 4, 5)
SMALL = {"B": 0xFF, "H": 0xFFFF, "I": 0xFFFFFFFF}


def make_text(text: bytes) -> bytes:
    return struct.pack("<H", len(text)) + text


def make_body(rng: random.Random, kind: int) -> bytes:
    """With the numbers and texts that the request needs, mostly. The first number is a fid, and often one in use."""
    body = b""
    for index, letter in enumerate(SHAPES.get(kind, "")):  # type: ignore[call-overload]  # an int finds its IntEnum
        if letter == "s":
            body += make_text(rng.choice((*NAMES, b"a\0b")))
            continue
        number = rng.choice(LARGE if letter == "Q" else NUMBERS) & SMALL.get(letter, (1 << 64) - 1)
        if index < 2 and rng.random() < 0.8:
            number = rng.choice(FIDS)
        body += struct.pack("<" + letter, number & SMALL.get(letter, number))
    if kind == NineKind.WALK:
        count = rng.choice((0, 1, 1, 2, 3, 16, 17))
        return body[:8] + struct.pack("<H", count) + b"".join(make_text(rng.choice(NAMES)) for _ in range(count))
    return body + rng.randbytes(rng.randrange(64)) if kind == NineKind.WRITE or rng.random() < 0.2 else body


def make_message(kind: int, tag: int, body: bytes) -> bytes:
    return struct.pack("<IBH", HEAD_SIZE + len(body), kind, tag) + body


def make_stream(rng: random.Random) -> bytes:
    """What a guest sends: Tversion and Tattach, mostly, and requests, some of which are damaged."""
    stream = bytearray()
    if rng.random() < 0.95:
        stream += make_message(
            NineKind.VERSION, 0xFFFF, struct.pack("<I", rng.choice((8192, 1 << 17))) + make_text(VERSION)
        )
        stream += make_message(NineKind.ATTACH, 0, struct.pack("<II", 1, NO_FID) + make_text(b"") * 2 + bytes(4))
    for _ in range(rng.randrange(MESSAGES_MAX)):
        kind = rng.choice((*SHAPES, NineKind.WALK, NineKind.WALK, NineKind.LOPEN, NineKind.LCREATE, 3, 7, 99))
        if kind in (NineKind.VERSION, 7) and rng.random() < 0.9:
            kind = int(NineKind.WALK)
        message = bytearray(make_message(kind, rng.getrandbits(16), make_body(rng, kind)))
        if rng.random() < 0.1:
            message[rng.randrange(4 if rng.random() < 0.9 else 0, len(message))] = rng.randrange(256)
        if rng.random() < 0.02:
            del message[rng.randrange(len(message)) :]
        stream += message
    return bytes(stream)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the share lived to its end. Raises whatever a case may not."""
    with in_folder() as folder:
        return run_case(make_stream(rng), folder, rng)


def run_case(stream: bytes, folder: Path, rng: random.Random) -> bool:
    messages = NineMessages()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    server = NineSpeaker(fd, is_read_only=rng.random() < 0.1)
    try:
        while stream:
            room = messages.find_room()
            size = min(rng.choice((1, 7, 100, 1 << 16)), len(room), len(stream))
            room[:size] = stream[:size]
            messages.received(size)
            stream = stream[size:]
            while (message := messages.take()) is not None:
                check_answer(message, server.answer(message))
    except (ProtocolError, MountFailedError):
        return False
    finally:
        server.close()
        os.close(fd)
    return True


def check_answer(message: memoryview, answer: bytes) -> None:
    """One whole message to the same request."""
    kind, tag = struct.unpack_from("<4xBH", message)
    size, answered, answered_tag = struct.unpack_from("<IBH", answer)
    assert size == len(answer) <= MSIZE_MAX
    assert answered_tag == tag
    assert answered in (kind + 1, 7)
    if answered == 7:
        assert 0 < struct.unpack_from("<I", answer, HEAD_SIZE)[0] < 200


if __name__ == "__main__":
    run_program(__doc__, "shares", "to the end of the share", run_seeded)
