"""Fuzzes vshd's SFTP: any bytes give answers or the end of the connection, and each request one answer in its order.

The file system is real: a folder that is thrown away. A damaged packet could name a file elsewhere, so packets with a
slash or `..` are left out. Longer than under pytest: python -m tests.fuzz.fuzz_sftp --cases 1000000 --seed 1
"""

import contextlib
import os
import random
import resource
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.seeded import run_program
from vshd.services.sftp.packets import PACKET_MAX, PacketError, Splitter
from vshd.services.sftp.requests import Requests
from vshd.wire.output import Output

NAMES = (b"a", b"b", b"folder", b"link", b"", b".", b"~", b"n\xff\n", b"a\0b", b"n" * 300)
KINDS = (*range(3, 21), 200, 200, 200, 0, 2, 101, 255)
EXTENSIONS = (
    *(b"posix-rename@openssh.com", b"statvfs@openssh.com", b"fstatvfs@openssh.com", b"hardlink@openssh.com"),
    *(b"fsync@openssh.com", b"lsetstat@openssh.com", b"limits@openssh.com", b"expand-path@openssh.com"),
    *(b"copy-data", b"read-file@vmkit", b"write-file@vmkit", b"xattrs@vmkit", b"read-folder@vmkit"),
    b"x@example.org",
)
NUMBERS = (0, 1, 5, 4096, 1 << 18, 1 << 31, (1 << 32) - 1)
OFFSETS = (*NUMBERS, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PACKETS_MAX = 40
# What a case may write into one file.
FILE_MAX = 1 << 20


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def make_fields(rng: random.Random) -> bytes:
    """Fields that a request might have, in any order."""
    fields = b""
    for _ in range(rng.randrange(6)):
        match rng.randrange(5):
            case 0:
                fields += text(rng.choice(NAMES))
            case 1:
                fields += text(struct.pack(">I", rng.choice((0, 1, 2, 3, 99))))
            case 2:
                fields += struct.pack(">I", rng.choice((*NUMBERS, rng.randrange(64), rng.getrandbits(32))))
            case 3:
                fields += struct.pack(">Q", rng.choice(OFFSETS))
            case 4:
                fields += text(rng.randbytes(rng.randrange(50)))
    return fields


def make_request(rng: random.Random) -> bytes:
    """A request with the fields that it needs, mostly."""
    kind = rng.choice(KINDS)
    handle = text(struct.pack(">I", rng.randrange(3)))
    name, attributes = text(rng.choice(NAMES)), struct.pack(">I", rng.choice((0, 4))) + b"\0\0\1\xff"
    if rng.random() < 0.2:
        pair = text(rng.choice((b"xattr@vmkit", b"x"))) + text(rng.choice((b"user.a\0b", b"user.a", b"", b"x\0" * 9)))
        attributes = struct.pack(">II", 1 << 31, rng.choice((0, 1, 2, 65))) + pair * 2
    offset, size = struct.pack(">Q", rng.choice(OFFSETS)), struct.pack(">I", rng.choice(NUMBERS))
    good = {
        3: name + struct.pack(">I", rng.randrange(64)) + attributes,
        4: handle,
        5: handle + offset + size,
        6: handle + offset + text(rng.randbytes(rng.randrange(200))),
        8: handle,
        10: handle + attributes,
        12: handle,
        14: name + attributes,
        18: name + text(rng.choice(NAMES)),
        20: name + text(rng.choice(NAMES)),
    }.get(kind, name + attributes)
    if kind == 200:
        good = text(rng.choice(EXTENSIONS)) + rng.choice(
            (name, name * 2, handle, handle + 2 * offset + handle + offset, name * 2 + size + attributes + name)
        )
    fields = good if rng.random() < 0.7 else make_fields(rng)
    return bytes([kind]) + struct.pack(">I", rng.getrandbits(32)) + fields


def make_stream(rng: random.Random) -> bytes:
    """What a client sends: INIT, mostly, and requests, some of which are damaged."""
    stream = bytearray(text(b"\x01\0\0\0\x03")) if rng.random() < 0.95 else bytearray()
    for _ in range(rng.randrange(PACKETS_MAX)):
        packet = bytearray(text(make_request(rng)))
        if rng.random() < 0.3:
            at = rng.randrange(4 if rng.random() < 0.9 else 0, len(packet))
            packet[at] = rng.randrange(256)
        if rng.random() < 0.05:
            del packet[rng.randrange(len(packet)) :]
        stream += packet
    return bytes(stream)


@contextlib.contextmanager
def in_folder() -> Iterator[None]:
    """Works in a folder with a few files, in which no file can grow large."""
    before = Path.cwd()
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX, hard))
        try:
            Path("a").write_bytes(bytes(70_000))
            Path("folder").mkdir()
            Path("link").symlink_to("a")
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            Path(folder).chmod(0o700)
            os.chdir(before)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the connection lived to its end. Raises whatever a case may not."""
    with in_folder():
        return run_case(make_stream(rng), rng)


def run_case(stream: bytes, rng: random.Random) -> bool:
    output, splitter = Output(), Splitter()
    requests = Requests(output, b"/", lambda: rng.random() < 0.5)
    try:
        while stream:
            size = min(rng.choice((1, 7, 100, 1 << 16)), len(splitter.room()), len(stream))
            splitter.room()[:size] = stream[:size]
            splitter.received(size)
            stream = stream[size:]
            for packet in splitter.packets():
                if b"/" in bytes(packet) or b".." in bytes(packet):
                    continue
                requests.take(packet)
                check_answer(packet, output.take())
    except PacketError:
        return False
    finally:
        requests.close()
    return True


def check_answer(packet: memoryview, answer: bytes) -> None:
    """One whole packet, of the request's id."""
    (size,) = struct.unpack_from(">I", answer)
    assert size == len(answer) - 4 <= PACKET_MAX
    if packet[0] == 1:
        assert answer[4] == 2
        return
    assert answer[4] in (101, 102, 103, 104, 105, 201)
    assert answer[5:9] == bytes(packet[1:5])


if __name__ == "__main__":
    run_program(__doc__, "sftp", "to the end of the connection", run_seeded)
