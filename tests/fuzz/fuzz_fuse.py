"""Fuzzes the server of shared folders: any bytes give answers or the end of the share, and nothing outside changes.

The file system is real: a folder that is thrown away, beside one that must stay as it is. Longer than under pytest:
python -m tests.fuzz.fuzz_fuse --cases 1000000 --seed 1
"""

import contextlib
import os
import random
import resource
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.seeded import run_program
from vmkit.shares.cutter import ProtocolError
from vmkit.shares.fuse import HEAD_SIZE, MESSAGE_MAX, SHAPES, Messages, Op, Wire
from vmkit.shares.server import FolderServer

NAMES = (b"a", b"b", b"folder", b"link", b"out", b"", b".", b"..", b"../outside", b"/etc", b"n\xff\n", b"n" * 300)
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 64, 0o644, 0o6777, 0o100644, 0o20666, 4096, 1 << 20, (1 << 32) - 1)
LARGE = (*NUMBERS, 1 << 33, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
MESSAGES_MAX = 40
# What a case may write into one file.
FILE_MAX = 1 << 20
SPECIAL = (stat.S_ISCHR, stat.S_ISBLK, stat.S_ISFIFO, stat.S_ISSOCK)


def make_message(rng: random.Random, order: str, opcode: int) -> bytes:
    """A request with the numbers and names that it needs, mostly."""
    shape = SHAPES.get(opcode)  # type: ignore[call-overload]  # an int finds its IntEnum
    body = rng.randbytes(rng.randrange(100))
    if shape is not None:
        numbers = [rng.choice(NUMBERS if kind == "I" else LARGE) for kind in shape.numbers]
        if opcode in (Op.READ, Op.WRITE, Op.RELEASE, Op.READDIR, Op.READDIRPLUS):
            numbers[0] = rng.randrange(1, 6)
        body = struct.pack(order + shape.numbers, *numbers)
        body += b"".join(rng.choice(NAMES) + b"\0" for _ in range(shape.names))
        body += rng.randbytes(rng.randrange(64)) if rng.random() < 0.2 or opcode == Op.WRITE else b""
    node = rng.randrange(1, 6) if rng.random() < 0.9 else rng.choice(LARGE)
    head = struct.pack(order + "IIQQIIIHH", HEAD_SIZE + len(body), opcode, rng.getrandbits(64), node, 0, 0, 0, 0, 0)
    return head + body


def make_stream(rng: random.Random) -> bytes:
    """What a guest sends: INIT, mostly, and requests, some of which are damaged."""
    order = rng.choice("<>")
    stream = bytearray(make_message(rng, order, Op.INIT) if rng.random() < 0.95 else b"")
    for _ in range(rng.randrange(MESSAGES_MAX)):
        message = bytearray(make_message(rng, order, rng.choice((*SHAPES, 22, 43, 99))))
        if rng.random() < 0.1:
            message[rng.randrange(4 if rng.random() < 0.9 else 0, len(message))] = rng.randrange(256)
        if rng.random() < 0.02:
            del message[rng.randrange(len(message)) :]
        stream += message
    return bytes(stream)


@contextlib.contextmanager
def in_folder() -> Iterator[Path]:
    """A folder with a few files, in which no file can grow large, and links that lead to one beside it."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as root:
        folder, outside = Path(root, "folder"), Path(root, "outside")
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        (folder / "folder").mkdir(parents=True)
        (folder / "a").write_bytes(bytes(70_000))
        (folder / "link").symlink_to("../outside")
        (folder / "out").symlink_to("../outside/secret")
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX, hard))
        try:
            yield folder
            assert os.listdir(outside) == ["secret"]
            assert (outside / "secret").read_bytes() == b"secret"
            for path in folder.rglob("*"):
                mode = path.lstat().st_mode
                assert not any(is_special(mode) for is_special in SPECIAL), path
                assert not mode & (stat.S_ISUID | stat.S_ISGID), path
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            for path in (folder, *(path for path in folder.rglob("*") if not path.is_symlink() and path.is_dir())):
                path.chmod(0o700)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the share lived to its end. Raises whatever a case may not."""
    with in_folder() as folder:
        return run_case(make_stream(rng), folder, rng)


def run_case(stream: bytes, folder: Path, rng: random.Random) -> bool:
    messages, server = Messages(), None
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while stream:
            room = messages.find_room()
            size = min(rng.choice((1, 7, 100, 1 << 16)), len(room), len(stream))
            room[:size] = stream[:size]
            messages.received(size)
            stream = stream[size:]
            while (message := messages.take()) is not None:
                if server is None:
                    server = FolderServer(fd, Wire(messages.order), is_read_only=rng.random() < 0.1)
                check_answer(message, server.answer(message), messages.order)
    except ProtocolError:
        return False
    finally:
        if server is not None:
            server.close()
        os.close(fd)
    return True


def check_answer(message: memoryview, answer: bytes, order: str) -> None:
    """One whole message to the same request, or none."""
    opcode, unique = struct.unpack_from(order + "4xIQ", message)
    if opcode in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
        assert answer == b""
        return
    size, error, answered = struct.unpack_from(order + "IiQ", answer)
    assert size == len(answer) <= MESSAGE_MAX
    assert -200 < error <= 0
    assert answered == unique


if __name__ == "__main__":
    run_program(__doc__, "shares", "to the end of the share", run_seeded)
