"""What each request of SFTP does to real files, and which status a failure has."""

import os
import stat
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from tests.vshd import sftp_peer as sftp
from tests.vshd.sftp_peer import NO_ATTRIBUTES, Peer, text, u32, u64
from vshd.services.sftp import packets
from vshd.services.sftp.handles import HANDLES_MAX
from vshd.services.sftp.packets import DATA_MAX, PacketError
from vshd.services.sftp.requests import Requests
from vshd.wire.output import Output

READ, WRITE, APPEND, CREAT, TRUNC, EXCL = 1, 2, 4, 8, 16, 32
OK, EOF, NO_SUCH_FILE, DENIED, FAILURE, BAD_MESSAGE, UNSUPPORTED = 0, 1, 2, 3, 4, 5, 8
# A name that no encoding has.
ODD = b"n\xff\xfe\n\x80"


def path(folder: Path, name: bytes) -> bytes:
    return os.fsencode(folder) + b"/" + name


def field(folder: Path, name: bytes) -> bytes:
    return text(path(folder, name))


def test_version_announces_openssh_extensions() -> None:
    with Peer() as peer:
        assert (peer.version.kind, peer.version.ident) == (sftp.VERSION, 3)
        found = {}
        while peer.version.rest:
            name = peer.version.text()
            found[name] = peer.version.text()
    assert found == {
        b"posix-rename@openssh.com": b"1",
        b"statvfs@openssh.com": b"2",
        b"fstatvfs@openssh.com": b"2",
        b"hardlink@openssh.com": b"1",
        b"fsync@openssh.com": b"1",
        b"lsetstat@openssh.com": b"1",
        b"limits@openssh.com": b"1",
        b"expand-path@openssh.com": b"1",
        b"copy-data": b"1",
        b"read-file@vmkit": b"1",
        b"write-file@vmkit": b"1",
        b"read-folder@vmkit": b"1",
        b"xattrs@vmkit": b"1",
    }


def test_file_is_written_and_read_at_offsets(tmp_path: Path) -> None:
    with Peer() as peer:
        handle = peer.open(path(tmp_path, ODD), READ | WRITE | CREAT | EXCL, u32(4) + u32(0o640))
        assert peer.status(sftp.WRITE, handle, u64(3), text(b"defg")) == OK
        assert peer.status(sftp.WRITE, handle, u64(0), text(b"abc")) == OK
        answer = peer.ask(sftp.READ, handle, u64(2), u32(3))
        assert (answer.kind, answer.text(), answer.rest) == (sftp.DATA, b"cde", b"")
        assert peer.ask(sftp.READ, handle, u64(5), u32(100)).text() == b"fg"
        assert peer.ask(sftp.READ, handle, u64(5), u32(0)).text() == b""
        assert peer.status(sftp.READ, handle, u64(7), u32(1)) == EOF
        assert peer.ask(sftp.FSTAT, handle).attributes()["size"] == 7
        assert peer.status(sftp.CLOSE, handle) == OK
        assert peer.status(sftp.CLOSE, handle) == FAILURE
    file = Path(os.fsdecode(path(tmp_path, ODD)))
    assert file.read_bytes() == b"abcdefg"
    assert file.stat().st_mode & 0o777 == 0o640


def test_flags_of_open_are_those_of_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with Peer() as peer:
        name = field(tmp_path, b"f")
        assert peer.status(sftp.OPEN, name, u32(READ), NO_ATTRIBUTES) == NO_SUCH_FILE
        file.write_bytes(b"old")
        assert peer.ask(sftp.OPEN, name, u32(WRITE | CREAT | EXCL), NO_ATTRIBUTES).status() == (FAILURE, "File exists")
        handle = peer.open(os.fsencode(file), WRITE | APPEND)
        assert peer.status(sftp.WRITE, handle, u64(0), text(b"new")) == OK
        assert file.read_bytes() == b"oldnew"
        assert peer.status(sftp.READ, handle, u64(0), u32(1)) == NO_SUCH_FILE  # EBADF, as with OpenSSH
        peer.open(os.fsencode(file), WRITE | TRUNC)
        assert file.read_bytes() == b""
        assert peer.status(sftp.OPEN, text(os.fsencode(tmp_path)), u32(WRITE), NO_ATTRIBUTES) == FAILURE


def test_read_is_no_longer_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(DATA_MAX + 5))
    with Peer() as peer:
        handle = peer.open(path(tmp_path, b"f"), READ)
        assert len(peer.ask(sftp.READ, handle, u64(0), u32((1 << 32) - 1)).text()) == DATA_MAX


def test_fifo_without_a_peer_does_not_hold_the_connection_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Peer() as peer:
        assert peer.ask(sftp.OPEN, field(tmp_path, b"fifo"), u32(WRITE), NO_ATTRIBUTES).status()[0] == FAILURE
        handle = peer.open(path(tmp_path, b"fifo"), READ)
        assert peer.ask(sftp.READ, handle, u64(0), u32(1)).status() == (FAILURE, "Illegal seek")


def test_attributes_are_told_and_set(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    os.symlink("f", tmp_path / "link")
    own = u32(os.getuid()) + u32(os.getgid())
    everything = u32(15) + u64(3) + own + u32(stat.S_IFREG | 0o4711) + u32(1000) + u32(2000)
    with Peer() as peer:
        assert peer.status(sftp.SETSTAT, field(tmp_path, b"link"), everything) == OK
        found = peer.ask(sftp.STAT, field(tmp_path, b"link")).attributes()
        assert found == {
            **{"size": 3, "uid": os.getuid(), "gid": os.getgid(), "mode": stat.S_IFREG | 0o4711},
            **{"atime": 1000, "mtime": 2000},
        }
        assert stat.S_ISLNK(peer.ask(sftp.LSTAT, field(tmp_path, b"link")).attributes()["mode"])
        handle = peer.open(os.fsencode(file), WRITE)
        assert peer.status(sftp.FSETSTAT, handle, u32(15) + u64(1) + own + u32(0o600) + u32(1) + u32(2)) == OK
        assert peer.ask(sftp.FSTAT, handle).attributes()["mtime"] == 2
        assert peer.status(sftp.SETSTAT, field(tmp_path, b"f"), NO_ATTRIBUTES) == OK
    assert (file.read_bytes(), file.stat().st_mode & 0o7777) == (b"1", 0o600)


def test_attributes_of_a_link_itself_are_set(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    os.utime(tmp_path / "f", (5, 5))
    os.symlink("f", tmp_path / "link")
    own = u32(os.getuid()) + u32(os.getgid())
    with Peer() as peer:
        name = field(tmp_path, b"link")
        assert peer.extended(b"lsetstat@openssh.com", name, u32(10) + own + u32(1) + u32(2)).status()[0] == OK
        assert peer.extended(b"lsetstat@openssh.com", name, u32(1) + u64(0)).status()[0] == BAD_MESSAGE
        # Linux has no modes of links.
        assert peer.extended(b"lsetstat@openssh.com", name, u32(4) + u32(0o600)).status()[0] == UNSUPPORTED
    assert os.lstat(tmp_path / "link").st_mtime == 2
    assert (tmp_path / "f").stat().st_mtime == 5


def list_names(peer: Peer, folder: bytes) -> tuple[list[tuple[bytes, bytes, dict[str, int]]], int]:
    """All entries of a folder, and the number of answers."""
    handle = peer.opendir(folder)
    found, answers = [], 0
    while (answer := peer.ask(sftp.READDIR, handle)).kind == sftp.NAME:
        assert len(answer.rest) < 34_000 - 9
        answers += 1
        found += answer.names()
        assert answer.rest == b""
    assert answer.status()[0] == EOF
    assert peer.status(sftp.READDIR, handle) == EOF
    assert peer.status(sftp.CLOSE, handle) == OK
    return found, answers


def test_folder_lists_every_entry_once(tmp_path: Path) -> None:
    names = {b"%d" % number + bytes(b"n" * (number % 200)) for number in range(500)} | {ODD}
    for name in names:
        os.close(os.open(path(tmp_path, name), os.O_CREAT | os.O_WRONLY))
    os.symlink("nowhere", path(tmp_path, b"dangling"))
    with Peer() as peer:
        found, answers = list_names(peer, os.fsencode(tmp_path))
    assert sorted(name for name, _, _ in found) == sorted(names | {b".", b"..", b"dangling"})
    assert answers > 3
    assert all(attributes["mtime"] for _, _, attributes in found)


def test_listing_of_a_large_folder_keeps_nothing_of_it(tmp_path: Path) -> None:
    """The names alone are half a megabyte."""
    for number in range(3000):
        os.close(os.open(path(tmp_path, b"%0200d" % number), os.O_CREAT | os.O_WRONLY))
    count = 0
    with Peer() as peer:
        handle = peer.opendir(os.fsencode(tmp_path))
        tracemalloc.start()
        try:
            while (answer := peer.ask(sftp.READDIR, handle)).kind == sftp.NAME:
                count += answer.u32()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert count == 3002
    assert peak < 300_000


def test_long_name_is_a_line_of_ls(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"123")
    (tmp_path / "old").chmod(0o640)
    os.utime(tmp_path / "old", (0, 86400 * 365))
    with Peer() as peer:
        found, _ = list_names(peer, os.fsencode(tmp_path))
    (line,) = [line for name, line, _ in found if name == b"old"]
    mode, links, _user, _group, size, month, _day, year, name = line.split()
    assert (mode, links, size, month, name) == (b"-rw-r-----", b"1", b"3", b"Jan", b"old")
    assert year == b"1971"


def test_entry_that_vanishes_is_left_out(tmp_path: Path) -> None:
    """The kernel gave its name; by the time of stat() it is gone."""
    for number in range(500):
        (tmp_path / f"{number:0200d}").touch()
    with Peer() as peer:
        handle = peer.opendir(os.fsencode(tmp_path))
        assert peer.ask(sftp.READDIR, handle).kind == sftp.NAME
        for file in tmp_path.iterdir():
            file.unlink()
        assert peer.ask(sftp.READDIR, handle).kind in (sftp.NAME, sftp.STATUS)


def test_folders_are_made_and_removed(tmp_path: Path) -> None:
    with Peer() as peer:
        assert peer.status(sftp.MKDIR, field(tmp_path, ODD), u32(4) + u32(0o700)) == OK
        assert Path(os.fsdecode(path(tmp_path, ODD))).stat().st_mode & 0o777 == 0o700
        assert peer.ask(sftp.MKDIR, field(tmp_path, ODD), NO_ATTRIBUTES).status() == (FAILURE, "File exists")
        assert peer.status(sftp.REMOVE, field(tmp_path, ODD)) == FAILURE
        assert peer.status(sftp.RMDIR, field(tmp_path, ODD)) == OK
        assert peer.ask(sftp.RMDIR, field(tmp_path, ODD)).status() == (NO_SUCH_FILE, "No such file or directory")


def test_rename_never_replaces_and_posix_rename_does(tmp_path: Path) -> None:
    for name in (b"a", b"b"):
        (tmp_path / name.decode()).write_bytes(name)
    (tmp_path / "folder").mkdir()
    a, b = field(tmp_path, b"a"), field(tmp_path, b"b")
    with Peer() as peer:
        assert peer.ask(sftp.RENAME, a, b).status() == (FAILURE, "File exists")
        assert peer.status(sftp.RENAME, a, field(tmp_path, b"c")) == OK
        assert peer.status(sftp.RENAME, field(tmp_path, b"folder"), field(tmp_path, b"folder2")) == OK
        assert peer.status(sftp.RENAME, a, b) == NO_SUCH_FILE
        assert peer.extended(b"posix-rename@openssh.com", field(tmp_path, b"c"), b).status()[0] == OK
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "folder2"]
    assert (tmp_path / "b").read_bytes() == b"a"


def test_links_are_made_in_openssh_order_and_read(tmp_path: Path) -> None:
    with Peer() as peer:
        assert peer.status(sftp.SYMLINK, text(ODD), field(tmp_path, b"link")) == OK
        assert os.fsencode((tmp_path / "link").readlink()) == ODD
        ((name, line, attributes),) = peer.ask(sftp.READLINK, field(tmp_path, b"link")).names()
        assert (name, line, attributes) == (ODD, ODD, {})
        (tmp_path / "f").write_bytes(b"x")
        assert peer.ask(sftp.READLINK, field(tmp_path, b"f")).status() == (BAD_MESSAGE, "Invalid argument")
        # A hard link of a link is that link, not its target.
        assert peer.extended(b"hardlink@openssh.com", field(tmp_path, b"link"), field(tmp_path, b"h")).status()[0] == OK
        assert (tmp_path / "h").is_symlink()
        os.symlink("loop", tmp_path / "loop")
        assert peer.status(sftp.STAT, field(tmp_path, b"loop")) == NO_SUCH_FILE


def ask_realpath(peer: Peer, name: bytes) -> bytes | int:
    answer = peer.ask(sftp.REALPATH, text(name))
    return answer.names()[0][0] if answer.kind == sftp.NAME else answer.status()[0]


def test_realpath_follows_links_and_needs_all_but_the_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.path.realpath(os.fsencode(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with Peer() as peer:
        assert ask_realpath(peer, b"") == ask_realpath(peer, b".") == folder
        assert ask_realpath(peer, b"link/../link/new") == folder + b"/real/new"
        assert ask_realpath(peer, b"link/no/new") == NO_SUCH_FILE
        assert ask_realpath(peer, b"//") == b"/"


def test_expand_path_knows_home(tmp_path: Path) -> None:
    home = os.path.realpath(os.fsencode(tmp_path))
    (tmp_path / "docs").mkdir()
    with Peer(home) as peer:
        for name, want in ((b"~", home), (b"~/docs", home + b"/docs"), (b"~root/..", b"/"), (b"/tmp/..", b"/")):
            ((found, _, _),) = peer.extended(b"expand-path@openssh.com", text(name)).names()
            assert found == want
        assert peer.extended(b"expand-path@openssh.com", text(b"~nosuchuser/x")).status()[0] == NO_SUCH_FILE


def test_space_of_a_file_system_is_told(tmp_path: Path) -> None:
    want = os.statvfs(tmp_path)
    with Peer() as peer:
        handle = peer.open(path(tmp_path, b"f"), WRITE | CREAT)
        for answer in (
            peer.extended(b"statvfs@openssh.com", text(os.fsencode(tmp_path))),
            peer.extended(b"fstatvfs@openssh.com", handle),
        ):
            assert answer.kind == sftp.EXTENDED_REPLY
            numbers = [answer.u64() for _ in range(11)]
            assert answer.rest == b""
            assert numbers[:3] == [want.f_bsize, want.f_frsize, want.f_blocks]
            assert numbers[10] == want.f_namemax


def test_limits_are_told_and_hold(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with Peer() as peer:
        answer = peer.extended(b"limits@openssh.com")
        limits = [answer.u64() for _ in range(4)]
        assert limits == [packets.PACKET_MAX, DATA_MAX, DATA_MAX, HANDLES_MAX]
        handles = [peer.open(path(tmp_path, b"f"), READ) for _ in range(HANDLES_MAX - 1)]
        handles.append(peer.opendir(os.fsencode(tmp_path)))
        for kind, more in ((sftp.OPEN, u32(READ) + NO_ATTRIBUTES), (sftp.OPENDIR, b"")):
            code, words = peer.ask(kind, field(tmp_path, b"f"), more).status()
            assert (code, "has 512 open files" in words) == (FAILURE, True)
        assert peer.status(sftp.CLOSE, handles[7]) == OK
        assert peer.open(path(tmp_path, b"f"), READ) not in handles
    assert not [entry for entry in Path("/proc/self/fd").iterdir() if _leads_to(entry, tmp_path)]


def _leads_to(descriptor: Path, folder: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith(str(folder))
    except FileNotFoundError:
        return False


def test_fsync_takes_a_file(tmp_path: Path) -> None:
    with Peer() as peer:
        handle = peer.open(path(tmp_path, b"f"), WRITE | CREAT)
        assert peer.extended(b"fsync@openssh.com", handle).status()[0] == OK
        assert peer.extended(b"fsync@openssh.com", peer.opendir(os.fsencode(tmp_path))).status()[0] == FAILURE


@pytest.mark.parametrize("place", ["", "/dev/shm"])
def test_copy_data_copies_in_the_guest(tmp_path: Path, place: str) -> None:
    """Also from a file system to another one, between which most kernels do not copy."""
    data = os.urandom(700_000)
    with tempfile.NamedTemporaryFile(dir=place or tmp_path) as file, Peer() as peer:
        file.write(data)
        file.flush()
        source = peer.open(os.fsencode(file.name), READ)
        sink = peer.open(path(tmp_path, b"g"), READ | WRITE | CREAT)

        def copy(offset: int, size: int, at: int, to: bytes = sink) -> int:
            return peer.extended(b"copy-data", source, u64(offset), u64(size), to, u64(at)).status()[0]

        assert copy(10, 0, 3) == OK
        assert (tmp_path / "g").read_bytes() == bytes(3) + data[10:]
        assert copy(0, 5, 0) == OK
        assert (tmp_path / "g").read_bytes()[:6] == data[:5] + data[12:13]
        assert copy(699_999, 2, 0) == FAILURE
        assert copy(0, 0, 0, to=source) == FAILURE
        zero = peer.open(b"/dev/zero", READ)
        assert peer.extended(b"copy-data", zero, u64(0), u64(0), sink, u64(0)).status()[0] == FAILURE


def test_copy_ends_when_the_client_has_left(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)
    with Peer(is_wanted=lambda: False) as peer:
        source, sink = peer.open(path(tmp_path, b"f"), READ), peer.open(path(tmp_path, b"g"), WRITE | CREAT)
        answer = peer.extended(b"copy-data", source, u64(0), u64(0), sink, u64(0))
        assert answer.status() == (FAILURE, "the client has left")


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        (sftp.STAT, text(b"/etc\0/passwd"), BAD_MESSAGE),
        (sftp.STAT, text(b"n" * 300), BAD_MESSAGE),
        (sftp.STAT, text(b""), NO_SUCH_FILE),
        (sftp.STAT, u32(100) + b"short", BAD_MESSAGE),
        (sftp.STAT, b"", BAD_MESSAGE),
        (sftp.OPENDIR, text(b""), NO_SUCH_FILE),
        (sftp.OPENDIR, text(b"/etc/passwd"), NO_SUCH_FILE),
        (sftp.READ, text(b"abcd") + u64(0) + u32(1), FAILURE),
        (sftp.READ, text(b"a handle of another server") + u64(0) + u32(1), FAILURE),
        (sftp.READDIR, text(b"abcd"), FAILURE),
        (sftp.FSTAT, text(b""), FAILURE),
        (sftp.EXTENDED, text(b"vendor@example.org"), UNSUPPORTED),
        (99, b"", UNSUPPORTED),
        (sftp.STATUS, u32(0), UNSUPPORTED),
    ],
)
def test_nonsense_has_a_status(kind: int, fields: bytes, code: int) -> None:
    with Peer() as peer:
        assert peer.status(kind, fields) == code


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1])
def test_offset_beyond_every_file_has_a_status(tmp_path: Path, offset: int) -> None:
    with Peer() as peer:
        handle = peer.open(path(tmp_path, b"f"), READ | WRITE | CREAT)
        assert peer.status(sftp.READ, handle, u64(offset), u32(1)) == BAD_MESSAGE
        assert peer.status(sftp.WRITE, handle, u64(offset), text(b"x")) == BAD_MESSAGE
        assert peer.status(sftp.FSETSTAT, handle, u32(1) + u64(offset)) == BAD_MESSAGE


def test_request_before_init_ends_the_connection() -> None:
    output = Output()
    with pytest.raises(PacketError, match="before INIT"):
        Requests(output, b"/", lambda: True).take(memoryview(bytes([sftp.STAT]) + u32(1) + text(b"/")))
    assert not output.size
