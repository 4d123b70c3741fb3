"""vshd's extensions for small files: one request reads or writes a whole one."""

import os
from pathlib import Path

import pytest

from tests.vshd import sftp_peer as sftp
from tests.vshd.sftp_peer import NO_ATTRIBUTES, Peer, text, u32, u64
from tests.vshd.test_sftp_requests import BAD_MESSAGE, FAILURE, NO_SUCH_FILE, OK, field
from vshd.services.sftp.whole import WHOLE_MAX

GET, PUT = b"read-file@vmkit", b"write-file@vmkit"
OLD_S = 1_000_000_000


@pytest.mark.parametrize("size", [0, 1, WHOLE_MAX])
def test_file_is_read_with_its_attributes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "f").chmod(0o640)
    os.utime(tmp_path / "f", (OLD_S + 1, OLD_S))
    with Peer() as peer:
        answer = peer.extended(GET, field(tmp_path, b"f"))
        assert answer.kind == sftp.EXTENDED_REPLY
        found = answer.attributes()
        assert (found["size"], found["mode"], found["mtime"]) == (size, 0o100640, OLD_S)
        assert (answer.text(), answer.rest) == (data, b"")
        assert peer.requests.bytes_out == size


def test_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(WHOLE_MAX + 1))
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    with Peer() as peer:
        for name in (b"large", b"fifo", b"."):
            assert peer.extended(GET, field(tmp_path, name)).status()[0] == FAILURE
        assert peer.extended(GET, field(tmp_path, b"none")).status()[0] == NO_SUCH_FILE
        assert peer.extended(GET, u32(5)).status()[0] == BAD_MESSAGE
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("flags", [0, 1])
def test_file_is_written_and_gets_its_name(tmp_path: Path, flags: int) -> None:
    (tmp_path / "f").write_text("old")
    attributes = u32(4 | 8) + u32(0o640) + u32(OLD_S) + u32(OLD_S)
    with Peer() as peer:
        names = field(tmp_path, b"new"), field(tmp_path, b"f")
        assert peer.extended(PUT, *names, u32(flags), attributes, text(b"data")).status()[0] == OK
        assert peer.requests.bytes_in == 4
    found = (tmp_path / "f").stat()
    assert ((tmp_path / "f").read_text(), found.st_mode, found.st_mtime) == ("data", 0o100640, OLD_S)
    assert os.listdir(tmp_path) == ["f"]


def test_size_beyond_the_data_is_a_hole(tmp_path: Path) -> None:
    with Peer() as peer:
        names = field(tmp_path, b"new"), field(tmp_path, b"f")
        assert peer.extended(PUT, *names, u32(0), u32(1) + u64(5000), text(b"")).status()[0] == OK
    assert (tmp_path / "f").read_bytes() == bytes(5000)


def test_file_that_fails_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").write_text("old")
    with Peer() as peer:

        def put(temporary: bytes, name: bytes, *rest: bytes) -> int:
            return peer.extended(PUT, field(tmp_path, temporary), field(tmp_path, name), *rest).status()[0]

        good = u32(0), NO_ATTRIBUTES, text(b"data")
        # Its name is that of a directory; its temporary name is taken; its directory is missing; its size is too large.
        assert put(b"new", b"folder", *good) == FAILURE
        assert put(b"there", b"f", *good) == FAILURE
        assert put(b"none/new", b"f", *good) == NO_SUCH_FILE
        assert put(b"new", b"none/f", *good) == NO_SUCH_FILE
        assert put(b"new", b"f", u32(0), u32(1) + u64(1 << 63), text(b"data")) == BAD_MESSAGE
        assert put(b"new", b"f", u32(0), NO_ATTRIBUTES, u32(100)) == BAD_MESSAGE
    assert sorted(os.listdir(tmp_path)) == ["folder", "there"]
    assert (tmp_path / "there").read_text() == "old"
