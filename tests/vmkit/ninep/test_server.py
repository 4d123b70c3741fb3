"""A folder of this host as a guest's kernel with 9P sees it. What both protocols refuse is in tests/vmkit/shares."""

import errno
import gc
import os
import stat
import struct
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vmkit.ninep import kernel as nine
from tests.vmkit.ninep.kernel import MODE, MTIME, NO_FID, ROOT, SIZE, NineShared, text
from tests.vmkit.shares.test_server import expect
from vmkit.ninep import server as serving
from vmkit.ninep.messages import MSIZE_MAX
from vmkit.ninep.server import NineSpeaker
from vmkit.shares.cutter import MountFailedError, ProtocolError
from vmkit.shares.nodes import KnownFile


def test_file_is_made_written_read_and_removed(tmp_path: Path) -> None:
    with nothing_left_open(), NineShared(tmp_path) as kernel:
        found, handle = kernel.create(b"a", mode=0o640)
        assert (stat.S_IMODE(found.mode), found.uid, found.size) == (0o640, 0, 0)
        assert kernel.write(handle, b"hello") == 5
        assert kernel.read(handle, offset=1) == b"ello"
        kernel.clunk(handle)
        assert (tmp_path / "a").read_bytes() == b"hello"
        assert kernel.read_file(b"a") == b"hello"
        kernel.unlink(b"a")
        with expect(errno.ENOENT):
            kernel.look_up(b"a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("asked", "agreed"), [(8192, 8192), (131_072, 131_072), (1 << 31, MSIZE_MAX)])
def test_size_of_messages_is_agreed(tmp_path: Path, asked: int, agreed: int) -> None:
    (tmp_path / "a").write_bytes(bytes(2 << 20))
    with NineShared(tmp_path, msize=asked) as kernel:
        assert kernel.version == struct.pack("<I", agreed) + text(b"9P2000.L")
        assert len(kernel.read(kernel.open(kernel.look_up(b"a").node), size=1 << 31)) == agreed - 11


def test_other_versions_are_unknown(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        answer = kernel.call(nine.VERSION, struct.pack("<I", 8192) + text(b"9P2000.u"))
        assert answer == struct.pack("<I", 8192) + text(b"unknown")
        with pytest.raises(ProtocolError, match="the first message is not Tversion"):
            kernel.stat(ROOT)
        with pytest.raises(ProtocolError, match="the guest takes messages of 100 bytes"):
            kernel.call(nine.VERSION, struct.pack("<I", 100) + text(b"9P2000.L"))


def test_new_version_ends_what_was_before(tmp_path: Path) -> None:
    with nothing_left_open(), NineShared(tmp_path) as kernel:
        _, handle = kernel.create(b"a")
        kernel.call(nine.VERSION, struct.pack("<I", 8192) + text(b"9P2000.L"))
        for fid in (ROOT, handle):
            with expect(errno.EBADF):
                kernel.stat(fid)


def test_first_statfs_shows_that_the_guest_has_the_folder(tmp_path: Path) -> None:
    shared = NineShared(tmp_path)
    with shared as kernel:
        kernel.stat(ROOT)
        kernel.clunk(kernel.clone(ROOT))
        assert not shared.server.is_mounted
        answer = kernel.call(nine.STATFS, struct.pack("<I", ROOT))
        assert shared.server.is_mounted
    kind, size, blocks, *_, name_max = struct.unpack("<IIQQQQQQI", answer)
    found = os.statvfs(tmp_path)
    assert (kind, size, blocks, name_max) == (0x01021997, found.f_frsize, found.f_blocks, 255)


def test_reason_of_a_failed_mount_is_told(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    speaker = NineSpeaker(fd, is_read_only=False)
    with pytest.raises(MountFailedError, match="Cannot allocate memory"):
        speaker.answer(memoryview(struct.pack("<IBHI", 11, 7, 0xFFFF, errno.ENOMEM)))
    for body in (b"", bytes(4), b"\xff" * 4):
        with pytest.raises(MountFailedError, match="it gives no reason"):
            speaker.answer(memoryview(struct.pack("<IBH", 7 + len(body), 7, 0xFFFF) + body))
    os.close(fd)


def test_folder_is_listed_in_pieces(tmp_path: Path) -> None:
    names = {b"%03d" % number for number in range(300)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    (tmp_path / "n\udcff").mkdir()
    with nothing_left_open(), NineShared(tmp_path) as kernel:
        listed = kernel.list(size=400)
        assert set(listed) == names | {b".", b"..", b"n\xff"}
        assert (listed[b"n\xff"], listed[b"007"]) == (4, 8)
        # A listing that were empty would be the end.
        handle = kernel.open(ROOT)
        with expect(errno.EINVAL):
            kernel.call(nine.READDIR, struct.pack("<IQI", handle, 0, 20))
        assert kernel.call(nine.READDIR, struct.pack("<IQI", handle, 1 << 60, 400)) == bytes(4)


def test_walk_goes_as_far_as_the_names_lead(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    with NineShared(tmp_path) as kernel:
        assert kernel.step(ROOT, b"a", b"b")[1] == 2
        fid, count = kernel.step(ROOT, b"a", b"none", b"b")
        assert count == 1
        with expect(errno.EBADF):
            kernel.stat(fid)
        assert kernel.step(ROOT, b"a", b"file", b"x")[1] == 2
        with expect(errno.ENOENT):
            kernel.step(ROOT, b"none")
        with expect(errno.EINVAL):
            kernel.step(ROOT, *[b"a"] * 17)
        # Up is no way, not even within the folder.
        assert kernel.step(ROOT, b"a", b"..", b"a")[1] == 1
        # A fid of its own may walk on in its place.
        own = kernel.clone(ROOT)
        kernel.call(nine.WALK, struct.pack("<IIH", own, own, 1) + text(b"a"))
        assert kernel.look_up(b"b", own).mode & 0o40000


def test_numbers_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with NineShared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        for new in (ROOT, NO_FID):
            with expect(errno.EINVAL):
                kernel.call(nine.WALK, struct.pack("<IIH", node, new, 0))
        with expect(errno.EINVAL):
            kernel.call(nine.ATTACH, struct.pack("<II", ROOT, NO_FID) + text(b"") * 2 + bytes(4))
        kernel.call(nine.LOPEN, struct.pack("<II", node, 0))
        for kind, body in [
            (nine.LOPEN, struct.pack("<II", node, 0)),
            (nine.LCREATE, struct.pack("<I", node) + text(b"b") + bytes(12)),
            (nine.WALK, struct.pack("<IIH", node, node, 0)),
        ]:
            with expect(errno.EINVAL):
                kernel.call(kind, body)


def test_numbers_that_were_not_given_are_refused(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        for number in (0, 2, 99, NO_FID):
            for kind, body in [
                (nine.GETATTR, bytes(8)),
                (nine.READ, bytes(12)),
                (nine.CLUNK, b""),
                (nine.STATFS, b""),
                (nine.LOCK, bytes(29) + text(b"")),
                (nine.GETLOCK, bytes(21) + text(b"")),
                (nine.FSYNC, bytes(4)),
                (nine.REMOVE, b""),
            ]:
                with expect(errno.EBADF):
                    kernel.call(kind, struct.pack("<I", number) + body)
        # Nothing is open.
        for act in (lambda: kernel.read(ROOT), lambda: kernel.write(ROOT, b"x")):
            with expect(errno.EBADF):
                act()


def test_files_and_folders_are_not_mistaken(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        _, file = kernel.create(b"a")
        folder = kernel.open(ROOT)
        with expect(errno.EISDIR):
            kernel.read(folder)
        with expect(errno.ENOTDIR):
            kernel.call(nine.READDIR, struct.pack("<IQI", file, 0, 400))
        with expect(errno.EISDIR):
            kernel.open(ROOT, os.O_RDWR)


def test_unknown_and_foreign_requests_are_not_supported(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        for kind, body in [
            (nine.XATTRWALK, struct.pack("<II", ROOT, 9) + text(b"security.capability")),
            (nine.XATTRCREATE, struct.pack("<I", ROOT) + text(b"user.x") + bytes(12)),
            (nine.AUTH, struct.pack("<I", 9) + text(b"") * 2 + bytes(4)),
            (6, b""),
            (99, b"whatever"),
            (254, b""),
        ]:
            with expect(errno.EOPNOTSUPP):
                kernel.call(kind, body)


def test_remove_ends_its_fid(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with NineShared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        with expect(errno.EOPNOTSUPP):
            kernel.call(nine.REMOVE, struct.pack("<I", node))
        with expect(errno.EBADF):
            kernel.stat(node)
    assert (tmp_path / "a").exists()


def test_locks_are_left_to_the_guest(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        _, handle = kernel.create(b"a")
        assert kernel.call(nine.LOCK, struct.pack("<IBIQQI", handle, 1, 0, 0, 9, 77) + text(b"tiny")) == b"\0"
        answer = kernel.call(nine.GETLOCK, struct.pack("<IBQQI", handle, 1, 5, 9, 77) + text(b"tiny"))
        assert answer == struct.pack("<BQQI", 2, 5, 9, 77) + text(b"tiny")


def test_flush_has_an_answer(tmp_path: Path) -> None:
    """Without one, a program of the guest that is killed would wait for ever."""
    with NineShared(tmp_path) as kernel:
        assert kernel.call(nine.FLUSH, struct.pack("<H", 3)) == b""


def test_files_move_and_link(tmp_path: Path) -> None:
    with NineShared(tmp_path) as kernel:
        folder = kernel.make_folder(b"old").node
        inner, handle = kernel.create(b"file", folder)
        kernel.write(handle, b"x")
        kernel.rename(b"old", b"new")
        assert kernel.stat(inner.node).size == 1
        kernel.link(inner.node, b"hard")
        assert kernel.stat(inner.node).links == 2
        # By the file, and not by its name.
        kernel.call(nine.RENAME, struct.pack("<II", inner.node, ROOT) + text(b"moved"))
        with expect(errno.EPERM):
            kernel.call(nine.RENAME, struct.pack("<II", ROOT, ROOT) + text(b"root"))
        kernel.make_link(b"link", b"../else where")
        assert kernel.read_link(kernel.look_up(b"link").node) == b"../else where"
        kernel.remove_folder(b"new")
    assert sorted(os.listdir(tmp_path)) == ["hard", "link", "moved"]


def test_removed_file_lives_while_it_is_open(tmp_path: Path) -> None:
    with nothing_left_open(), NineShared(tmp_path) as kernel:
        made, handle = kernel.create(b"a")
        kernel.unlink(b"a")
        assert kernel.write(handle, b"still") == 5
        assert (kernel.stat(made.node).size, kernel.stat(made.node).links) == (5, 0)
        kernel.set(made.node, SIZE, handle=handle, size=2)
        assert kernel.read(handle) == b"st"
        kernel.clunk(handle)
        with expect(errno.ESTALE):
            kernel.stat(made.node)


def test_attributes_are_set(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    before = (tmp_path / "a").stat()
    with NineShared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        kernel.set(node, SIZE, size=2)
        kernel.set(node, MODE, mode=0o600)
        kernel.set(node, MTIME, modified=(1 << 64) - 5)
        assert kernel.stat(node).uid == 0
        with expect(errno.EINVAL):
            kernel.call(nine.SETATTR, struct.pack("<IIIIIQQQQQ", node, 0x120, 0, 0, 0, 0, 0, 0, 1, 10**9))
    after = (tmp_path / "a").stat()
    assert (after.st_size, stat.S_IMODE(after.st_mode), after.st_mtime) == (2, 0o600, -5)
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


def test_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    """For the C library a name ends there."""
    (tmp_path / "a").touch()
    with NineShared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        for act in (
            lambda: kernel.look_up(b"a\0b"),
            lambda: kernel.unlink(b"a\0b"),
            lambda: kernel.create(b"c\0d"),
            lambda: kernel.link(node, b"c\0d"),
            lambda: kernel.make_link(b"c", b"target\0more"),
        ):
            with expect(errno.EINVAL):
                act()
    assert os.listdir(tmp_path) == ["a"]


def test_read_only_share_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    with NineShared(tmp_path, is_read_only=True) as kernel:
        node = kernel.look_up(b"a").node
        handle = kernel.open(node)
        for act in (
            lambda: kernel.set(node, MODE, mode=0o777),
            lambda: kernel.make_link(b"link", b"target"),
            lambda: kernel.make_node(b"new", stat.S_IFREG | 0o644),
            lambda: kernel.make_folder(b"new"),
            lambda: kernel.unlink(b"a"),
            lambda: kernel.remove_folder(b"a"),
            lambda: kernel.rename(b"a", b"new"),
            lambda: kernel.call(nine.RENAME, struct.pack("<II", node, ROOT) + text(b"new")),
            lambda: kernel.link(node, b"new"),
            lambda: kernel.create(b"new", flags=os.O_RDONLY),
            lambda: kernel.write(handle, b"x"),
            lambda: kernel.open(node, os.O_WRONLY),
            lambda: kernel.open(node, os.O_RDWR),
            lambda: kernel.open(node, os.O_RDONLY | os.O_TRUNC),
        ):
            with expect(errno.EROFS):
                act()
        assert kernel.read(handle) == b"kept"
    assert os.listdir(tmp_path) == ["a"]


def count_nodes() -> int:
    gc.collect()
    return sum(isinstance(found, KnownFile) for found in gc.get_objects())


def test_way_to_a_fid_is_known_while_it_lives(tmp_path: Path) -> None:
    """Linux walks sixteen names at once, and has no fid for the folders between."""
    (tmp_path / "a/b/c/d").mkdir(parents=True)
    (tmp_path / "a/b/c/d/file").touch()
    with NineShared(tmp_path) as kernel:
        before = count_nodes()
        fid, count = kernel.step(ROOT, b"a", b"b", b"c", b"d", b"file")
        assert count == 5
        assert count_nodes() == before + 5
        kernel.stat(fid)
        kernel.rename(b"a", b"new")
        kernel.stat(fid)
        # The folders above another way, as a program of this host may have it.
        (tmp_path / "new/b").rename(tmp_path / "b")
        other, _ = kernel.step(ROOT, b"b", b"c", b"d")
        kernel.stat(fid)
        kernel.clunk(fid)
        kernel.stat(other)
        kernel.clunk(other)
        assert count_nodes() == before


def test_number_of_fids_has_a_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "FIDS_MAX", 3)
    with NineShared(tmp_path) as kernel:
        kernel.clone(ROOT)
        last = kernel.clone(ROOT)
        with expect(errno.ENFILE):
            kernel.clone(ROOT)
        kernel.clunk(last)
        kernel.clone(ROOT)


def test_deep_paths_are_reached(tmp_path: Path) -> None:
    """Longer than a path of one system call may be, 4096 bytes."""
    name = b"d" * 200
    with nothing_left_open(), NineShared(tmp_path) as kernel:
        node = ROOT
        for _ in range(40):
            node = kernel.make_folder(name, node).node
        _, handle = kernel.create(b"file", node)
        assert kernel.write(handle, b"deep") == 4
        assert set(kernel.list(node)) == {b".", b"..", b"file"}


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        (nine.GETATTR, bytes(4), "needs more"),
        (nine.WALK, struct.pack("<IIH", ROOT, 9, 2) + text(b"a"), "without an end"),
        (nine.WALK, struct.pack("<IIH", ROOT, 9, 1) + b"\xff\xffa", "without an end"),
        (nine.SYMLINK, struct.pack("<I", ROOT) + text(b"a") + b"\x01", "without an end"),
        (nine.WRITE, struct.pack("<IQI", ROOT, 0, 5) + b"four", "writes 5 bytes, and has 4"),
        (nine.FLUSH, b"", "needs more"),
        (nine.CLUNK, bytes(nine.MSIZE), "were agreed"),
    ],
)
def test_request_that_is_cut_off_ends_the_share(tmp_path: Path, kind: int, body: bytes, reason: str) -> None:
    with NineShared(tmp_path) as kernel, pytest.raises(ProtocolError, match=reason):
        kernel.call(kind, body)
