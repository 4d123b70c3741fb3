"""vshd's extensions for small files: one request reads or writes a whole one."""

import os
from pathlib import Path

import pytest

from tests.other_user import ask_as_other
from tests.vshd import sftp_peer as sftp
from tests.vshd.sftp_peer import NO_ATTRIBUTES, Peer, text, u32, u64
from tests.vshd.test_sftp_requests import BAD_MESSAGE, EOF, FAILURE, NO_SUCH_FILE, OK, field
from vshd.services.sftp.whole import WHOLE_MAX

GET, PUT, LIST = b"read-file@vmkit", b"write-file@vmkit", b"read-folder@vmkit"
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


def list_folder(peer: Peer, folder: Path) -> tuple[list[list[bytes]], dict[bytes, tuple[int, bytes | None]]]:
    """The names of each answer to read-folder, and what each name has: its mode, and its data."""
    handle = peer.ask(sftp.OPENDIR, text(os.fsencode(folder))).text()
    answers: list[list[bytes]] = []
    found: dict[bytes, tuple[int, bytes | None]] = {}
    while (answer := peer.extended(LIST, text(handle))).kind == sftp.EXTENDED_REPLY:
        answers.append([])
        for _ in range(answer.u32()):
            name, attributes = answer.text(), answer.attributes()
            answers[-1].append(name)
            found[name] = attributes.get("mode", 0), answer.text() if answer.u32() else None
        assert answer.rest == b""
    assert answer.status()[0] == EOF
    return answers, found


def test_folder_is_read_with_the_data_of_small_files(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("data")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "most").write_bytes(b"m" * WHOLE_MAX)
    (tmp_path / "large").write_bytes(bytes(WHOLE_MAX + 1))
    (tmp_path / "link").symlink_to("small")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    with Peer() as peer:
        _, found = list_folder(peer, tmp_path)
        data = {name: data for name, (_, data) in found.items() if data is not None}
        assert data == {b"small": b"data", b"empty": b"", b"most": b"m" * WHOLE_MAX}
        kinds = {name: mode & 0o170000 for name, (mode, _) in found.items()}
        assert kinds[b"link"] == 0o120000
        assert kinds[b"fifo"] == 0o010000
        assert set(found) == {b"small", b"empty", b"most", b"large", b"link", b"folder", b"fifo"}
        assert peer.requests.bytes_out == 4 + WHOLE_MAX
    assert len(os.listdir("/proc/self/fd")) == before


def test_answers_to_read_folder_fit_into_packets(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes(WHOLE_MAX))
    with Peer() as peer:
        answers, found = list_folder(peer, tmp_path)
    # Four files are below the limit of an answer, and the fifth passes it.
    assert [len(names) for names in answers] == [4, 4, 4, 4, 4]
    assert len(found) == 20


def test_files_of_proc_come_without_data(tmp_path: Path) -> None:
    """Their sizes say nothing."""
    with Peer() as peer:
        _, found = list_folder(peer, Path("/proc/self/net"))
    assert found[b"dev"][1] is None


@pytest.mark.root
def test_file_that_may_not_be_read_comes_without_data(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "secret").chmod(0)
    tmp_path.chmod(0o755)

    def ask() -> object:
        with Peer() as peer:
            return list_folder(peer, Path(os.curdir))[1]

    os.chdir(tmp_path)
    try:
        assert ask_as_other(ask) == repr({b"secret": (0o100000, None)})
    finally:
        os.chdir("/")


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
