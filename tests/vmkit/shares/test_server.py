"""A folder of this host as a guest's kernel sees it: files live, move and end as on a disk."""

import errno
import os
import stat
import struct
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vmkit.shares import kernel as fuse
from tests.vmkit.shares.kernel import ROOT, Found, Kernel, Shared
from tests.vsh.live import CHECKOUT

SIZE, MODE, OWNERS, MTIME, HANDLE = 1 << 3, 1 << 0, 6, 1 << 5, 1 << 6


def expect(code: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=f"^\\[Errno {code}\\]")


@pytest.mark.parametrize("order", ["<", ">"])
def test_file_is_made_written_read_and_removed(tmp_path: Path, order: str) -> None:
    with nothing_left_open(), Shared(tmp_path, order=order) as kernel:
        found, handle = kernel.create(b"a", mode=0o640)
        assert (stat.S_IMODE(found.mode), found.uid, found.size) == (0o640, 0, 0)
        assert kernel.write(handle, b"hello") == 5
        assert kernel.read(handle, offset=1) == b"ello"
        kernel.release(handle)
        assert (tmp_path / "a").read_bytes() == b"hello"
        assert kernel.read_file(b"a") == b"hello"
        kernel.call(fuse.UNLINK, ROOT, tail=b"a\0")
        with expect(errno.ENOENT):
            kernel.look_up(b"a")
    assert not (tmp_path / "a").exists()


def test_kernel_is_promised_what_the_server_does(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        major, minor, readahead, features, _, _, write_max, _, pages, *_ = kernel.init
    assert (major, minor) == (7, 31)
    assert readahead == write_max == pages * 4096 == 1 << 20
    # Neither locks nor ACLs: the guest's kernel keeps locks among its own programs.
    assert not features & (1 << 1 | 1 << 10 | 1 << 20)


def test_folder_is_listed_with_and_without_entries(tmp_path: Path) -> None:
    names = {b"%03d" % number for number in range(300)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    (tmp_path / "n\udcff").mkdir()
    with nothing_left_open(), Shared(tmp_path) as kernel:
        listed = kernel.list()
        assert set(listed) == names | {b".", b"..", b"n\xff"}
        assert all(number for name, number in listed.items() if name not in (b".", b".."))
        assert set(kernel.list(opcode=fuse.READDIR)) == set(listed)
        # The listing told of the file as a look-up does.
        assert kernel.look_up(b"007").node == listed[b"007"]


def test_folder_read_anew_shows_new_names(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        assert set(kernel.list()) == {b".", b".."}
        (tmp_path / "new").touch()
        assert b"new" in kernel.list()


def test_rename_moves_all_that_is_below(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        folder = kernel.make_folder(b"old")
        inner, handle = kernel.create(b"file", folder.node)
        kernel.write(handle, b"x")
        kernel.rename(b"old", b"new")
        assert kernel.stat(inner.node).size == 1
        assert (tmp_path / "new/file").read_bytes() == b"x"
        assert kernel.look_up(b"new").node == folder.node


def test_rename_honours_its_flags(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        (tmp_path / "a").write_text("a")
        (tmp_path / "b").write_text("b")
        first, second = kernel.look_up(b"a"), kernel.look_up(b"b")
        with expect(errno.EEXIST):
            kernel.rename(b"a", b"b", flags=1)
        kernel.rename(b"a", b"b", flags=2)
        assert (kernel.look_up(b"b").node, kernel.look_up(b"a").node) == (first.node, second.node)
        with expect(errno.EINVAL):
            kernel.rename(b"a", b"b", flags=4)
        kernel.call(fuse.RENAME, ROOT, "Q", ROOT, tail=b"a\0b\0")
        assert (tmp_path / "b").read_text() == "b"


def test_hard_links_are_one_node(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        made, handle = kernel.create(b"a")
        linked = Found(kernel.call(fuse.LINK, ROOT, "Q", made.node, tail=b"b\0"))
        assert (linked.node, linked.links) == (made.node, 2)
        kernel.call(fuse.UNLINK, ROOT, tail=b"a\0")
        assert kernel.look_up(b"b").node == made.node
        kernel.write(handle, b"x")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_removed_file_lives_while_it_is_open(tmp_path: Path) -> None:
    with nothing_left_open(), Shared(tmp_path) as kernel:
        made, handle = kernel.create(b"a")
        kernel.call(fuse.UNLINK, ROOT, tail=b"a\0")
        assert kernel.write(handle, b"still") == 5
        assert (kernel.stat(made.node).size, kernel.stat(made.node).links) == (5, 0)
        kernel.set(made.node, SIZE | HANDLE, handle=handle, size=2)
        assert kernel.read(handle) == b"st"
        kernel.release(handle)
        with expect(errno.ESTALE):
            kernel.stat(made.node)


def test_attributes_are_set(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    before = (tmp_path / "a").stat()
    with Shared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        kernel.set(node, SIZE, size=2)
        kernel.set(node, MODE, mode=0o600)
        kernel.set(node, MTIME, modified=(1 << 64) - 5)
        # A chown seems to succeed, and changes nothing.
        kernel.set(node, OWNERS)
        assert kernel.stat(node).uid == 0
    after = (tmp_path / "a").stat()
    assert (after.st_size, stat.S_IMODE(after.st_mode), after.st_mtime) == (2, 0o600, -5)
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


def test_link_has_its_text(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        made = Found(kernel.call(fuse.SYMLINK, ROOT, tail=b"link\0../else where\0"))
        assert kernel.call(fuse.READLINK, made.node) == b"../else where"
        kernel.set(made.node, MTIME, modified=77)
    assert (tmp_path / "link").readlink() == Path("../else where")
    assert (tmp_path / "link").lstat().st_mtime == 77


def test_guest_keeps_what_nobody_has_changed(tmp_path: Path) -> None:
    def flags_of(kernel: Kernel, node: int) -> int:
        handle, flags, _ = struct.unpack("<QII", kernel.call(fuse.OPEN, node, "II", os.O_RDONLY, 0))
        kernel.release(handle)
        return int(flags)

    file = tmp_path / "a"
    file.write_text("one")
    with Shared(tmp_path) as kernel:
        node = kernel.look_up(b"a").node
        assert [flags_of(kernel, node), flags_of(kernel, node)] == [0, 2]
        file.write_text("other")
        assert flags_of(kernel, node) == 0


def test_forgotten_node_is_told_of_anew(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with Shared(tmp_path) as kernel:
        first = kernel.look_up(b"a").node
        kernel.look_up(b"a")
        kernel.forget(first, 1)
        kernel.stat(first)
        kernel.forget(first, 1)
        with expect(errno.ESTALE):
            kernel.stat(first)
        assert kernel.look_up(b"a").node != first


def test_unknown_requests_are_not_implemented(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        for opcode in (fuse.GETXATTR, 999):
            with expect(errno.ENOSYS):
                kernel.call(opcode, ROOT, "II", 0, 0, tail=b"security.capability\0")


def test_disk_space_is_the_hosts(tmp_path: Path) -> None:
    with Shared(tmp_path) as kernel:
        blocks, _, _, _, _, _, name_max, frsize, _ = struct.unpack_from("<5Q4I", kernel.call(fuse.STATFS, ROOT))
    found = os.statvfs(tmp_path)
    assert (blocks, frsize, name_max) == (found.f_blocks, found.f_frsize, 255)


def test_deep_paths_are_reached(tmp_path: Path) -> None:
    """Longer than a path of one system call may be, 4096 bytes."""
    name = b"d" * 200
    with nothing_left_open(), Shared(tmp_path) as kernel:
        node = ROOT
        for _ in range(40):
            node = kernel.make_folder(name, node).node
        _, handle = kernel.create(b"file", node)
        assert kernel.write(handle, b"deep") == 4
        assert set(kernel.list(node)) == {b".", b"..", b"file"}


FEW = """
import errno, os, resource, sys
from contextlib import AbstractContextManager
from pathlib import Path
from tests.vmkit.shares.kernel import ROOT, Shared
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with Shared(Path(sys.argv[1])) as kernel:
    for _ in range(3):
        nodes = [node for name, node in kernel.list().items() if node]
    assert len(nodes) == 1000
    for node in nodes:
        kernel.stat(node)
    handles = []
    try:
        for node in nodes:
            handles.append(kernel.open(node))
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    # What it serves beside open files still works, and so does an open after a close.
    kernel.stat(nodes[0])
    assert len(kernel.list()) == 1002
    kernel.release(handles.pop())
    kernel.open(nodes[-1])
    print(len(handles))
"""


def test_guest_that_knows_many_files_needs_no_descriptors(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / str(number)).touch()
    done = subprocess.run(
        [sys.executable, "-c", FEW, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) >= 16
