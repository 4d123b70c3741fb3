"""vshd's extension for extended attributes: it reads them, and every request that sets attributes sets them."""

import os
import struct
from pathlib import Path

import pytest

from tests.vshd import sftp_peer as sftp
from tests.vshd.sftp_peer import Peer, text, u32
from tests.vshd.test_sftp_requests import FAILURE, NO_SUCH_FILE, OK, field
from vshd.services.sftp import packets
from vshd.services.sftp.packets import XATTR, Fields, render_xattrs
from vshd.services.sftp.xattrs import XATTRS_SIZE_MAX

GET, PUT = b"xattrs@vmkit", b"write-file@vmkit"
EXTENDED_FLAG = 1 << 31


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with two attributes."""
    path = tmp_path / "f"
    path.write_text("data")
    try:
        os.setxattr(path, "user.a", b"1\0")
        os.setxattr(path, "user.b", b"")
    except OSError as error:
        pytest.skip(f"the file system of {path} has no extended attributes: {error.strerror}")
    return path


def pairs_of(*words: bytes) -> bytes:
    """An ATTRS structure of pairs of the type xattr@vmkit."""
    return u32(EXTENDED_FLAG) + u32(len(words)) + b"".join(text(XATTR) + text(word) for word in words)


def read(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def test_attributes_are_read(file: Path) -> None:
    with Peer() as peer:
        answer = peer.extended(GET, field(file.parent, b"f"))
        assert answer.kind == sftp.EXTENDED_REPLY
        fields = Fields(memoryview(answer.rest))
        assert dict(fields.attributes().xattrs) == {b"user.a": b"1\0", b"user.b": b""}
        assert peer.extended(GET, field(file.parent, b"none")).status()[0] == NO_SUCH_FILE
        # A file system without them has no attributes, and that is no error.
        assert peer.extended(GET, text(b"/proc/self/status")).rest == u32(EXTENDED_FLAG) + u32(0)


def test_too_many_are_refused(file: Path) -> None:
    try:
        for number in range(packets.EXTENDED_ATTRIBUTES_MAX):
            os.setxattr(file, f"user.n{number}", b"")
    except OSError:
        pytest.skip("this file system takes few attributes for one file")
    with Peer() as peer:
        assert peer.extended(GET, field(file.parent, b"f")).status()[0] == FAILURE


def test_answer_fits_into_a_packet() -> None:
    pairs = [(b"user." + b"n" * 250, bytes(XATTRS_SIZE_MAX // packets.EXTENDED_ATTRIBUTES_MAX))]
    assert len(render_xattrs(pairs * packets.EXTENDED_ATTRIBUTES_MAX)) < packets.PACKET_MAX - 100


def test_attributes_are_set_and_removed_with_the_others(file: Path) -> None:
    with Peer() as peer:
        assert peer.ask(sftp.SETSTAT, field(file.parent, b"f"), pairs_of(b"user.c\0new", b"user.a")).status()[0] == OK
        assert read(file) == {"user.b": b"", "user.c": b"new"}
        # What is not there is removed already.
        assert peer.ask(sftp.SETSTAT, field(file.parent, b"f"), pairs_of(b"user.a")).status()[0] == OK


def test_other_types_are_skipped(file: Path) -> None:
    other = u32(EXTENDED_FLAG) + u32(1) + text(b"other@example.com") + text(b"user.x\0y")
    with Peer() as peer:
        assert peer.ask(sftp.SETSTAT, field(file.parent, b"f"), other).status()[0] == OK
    assert set(read(file)) == {"user.a", "user.b"}


def test_small_file_gets_them_in_its_one_message(file: Path) -> None:
    mode = struct.pack(">II", EXTENDED_FLAG | 4, 0o400) + pairs_of(b"user.x\0y")[4:]
    with Peer() as peer:
        names = field(file.parent, b"new"), field(file.parent, b"whole")
        assert peer.extended(PUT, *names, u32(0), mode, text(b"data")).status()[0] == OK
    assert read(file.parent / "whole") == {"user.x": b"y"}
    assert (file.parent / "whole").stat().st_mode & 0o777 == 0o400


def test_error_names_the_attribute_and_leaves_no_file(file: Path) -> None:
    with Peer() as peer:
        names = field(file.parent, b"new"), field(file.parent, b"whole")
        code, said = peer.extended(PUT, *names, u32(0), pairs_of(b"nothing\0y"), text(b"data")).status()
        assert code == FAILURE
        assert said.startswith("cannot set the attribute nothing: ")
    assert os.listdir(file.parent) == ["f"]
