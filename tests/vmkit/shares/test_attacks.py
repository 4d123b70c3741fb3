"""A guest that speaks FUSE or 9P by itself, and programs that rename while it walks: nothing outside is reached."""

import errno
import gc
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.vmkit.ninep.kernel import NineShared
from tests.vmkit.shares import kernel as fuse
from tests.vmkit.shares.kernel import ROOT, Kernel, Shared
from tests.vmkit.shares.test_server import MODE, SIZE, expect
from tests.vsh.live import CHECKOUT
from vmkit.shares.cutter import ProtocolError
from vmkit.shares.nodes import KnownFile

SECRET = b"of the host alone"
RACES = 500


# Both have the same calls.
Protocol = type[Shared] | type[NineShared]


@pytest.fixture(params=[Shared, NineShared], ids=["fuse", "9p"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    """What the guest speaks."""
    found: Protocol = request.param
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shared folder, beside a file that no guest may read or change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(SECRET)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_bytes(b"shared")
    return tmp_path / "shared"


@pytest.fixture(autouse=True)
def nothing_outside_changes(tmp_path: Path) -> Iterator[None]:
    yield
    if (tmp_path / "outside").exists():
        assert os.listdir(tmp_path / "outside") == ["secret"]
        assert (tmp_path / "outside/secret").read_bytes() == SECRET


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../outside", b"/etc", b"file/../../outside", b"a/b"])
def test_names_are_of_one_step(protocol: Protocol, folder: Path, name: bytes) -> None:
    with protocol(folder) as kernel:
        file = kernel.look_up(b"file").node
        acts: list[Callable[[], object]] = [
            lambda: kernel.look_up(name),
            lambda: kernel.unlink(name),
            lambda: kernel.remove_folder(name),
            lambda: kernel.make_folder(name),
            lambda: kernel.make_node(name, stat.S_IFREG | 0o644),
            lambda: kernel.create(name),
            lambda: kernel.link(file, name),
            lambda: kernel.rename(b"file", name),
            lambda: kernel.rename(name, b"file"),
            lambda: kernel.make_link(name, b"target"),
        ]
        for act in acts:
            with expect(errno.EINVAL):
                act()


@pytest.mark.parametrize("target", ["../outside", "/", "/proc/self/root", "/proc/self/cwd", "outside"])
def test_links_lead_nowhere(protocol: Protocol, folder: Path, target: str) -> None:
    """The guest makes a link; the host follows none: not as a folder, and not as a file."""
    target = target.replace("outside", str(folder.parent / "outside")) if target == "outside" else target
    with protocol(folder) as kernel:
        kernel.make_link(b"link", os.fsencode(target))
        link = kernel.look_up(b"link")
        assert stat.S_ISLNK(link.mode)
        for name in (b"secret", b"etc", b"shared"):
            with pytest.raises(OSError, match="Errno"):
                kernel.look_up(name, link.node)
            with pytest.raises(OSError, match="Errno"):
                kernel.create(name, link.node)
        with pytest.raises(OSError, match="Errno"):
            kernel.open(link.node)
        with pytest.raises(OSError, match="Errno"):
            kernel.list(link.node)
        with pytest.raises(OSError, match="Errno"):
            kernel.set(link.node, SIZE, size=0)


def test_create_follows_no_link(protocol: Protocol, folder: Path) -> None:
    (folder / "link").symlink_to("../outside/secret")
    (folder / "new").symlink_to("../outside/new")
    with protocol(folder) as kernel:
        for name in (b"link", b"new"):
            with pytest.raises(OSError, match="Errno"):
                kernel.create(name, flags=os.O_RDWR | os.O_TRUNC)


def test_folder_that_becomes_a_link_is_stale(protocol: Protocol, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/secret").write_bytes(b"inside")
    with protocol(folder) as kernel:
        sub, inner = kernel.look_up(b"sub"), kernel.walk(b"sub/secret")
        (folder / "sub").rename(folder / "aside")
        (folder / "sub").symlink_to("../outside")
        for act in (
            lambda: kernel.open(inner.node, os.O_RDWR),
            lambda: kernel.look_up(b"secret", sub.node),
            lambda: kernel.list(sub.node),
            lambda: kernel.create(b"new", sub.node),
            lambda: kernel.set(inner.node, SIZE, size=0),
            lambda: kernel.unlink(b"secret", sub.node),
        ):
            with pytest.raises(OSError, match="Errno"):
                act()


def test_folder_that_is_moved_out_is_out_of_reach(protocol: Protocol, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/file").write_bytes(b"was shared")
    with protocol(folder) as kernel:
        sub, inner = kernel.look_up(b"sub"), kernel.walk(b"sub/file")
        (folder / "sub").rename(folder.parent / "moved")
        with expect(errno.ESTALE):
            kernel.stat(inner.node)
        with expect(errno.ENOENT):
            kernel.look_up(b"file", sub.node)


SWAP = """
import os, sys
os.chdir(sys.argv[1])
print(flush=True)
while True:
    for old, new in (("sub", "aside"), ("link", "sub"), ("sub", "link"), ("aside", "sub")):
        os.rename(old, new)
"""


@contextmanager
def swapping(folder: Path) -> Iterator[None]:
    """A program that exchanges a folder with a link to one outside, as fast as the host can."""
    with subprocess.Popen([sys.executable, "-c", SWAP, str(folder)], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        try:
            yield
            assert program.poll() is None
        finally:
            program.kill()


def test_renames_while_walking_never_lead_out(protocol: Protocol, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/secret").write_bytes(b"inside")
    (folder / "link").symlink_to("../outside")
    with protocol(folder) as kernel, swapping(folder):
        sub = kernel.look_up(b"file")
        for _ in range(RACES):
            with suppress(OSError):
                sub = kernel.look_up(b"sub")
            with suppress(OSError):
                assert kernel.read_file(b"sub/secret") == b"inside"
            with suppress(OSError):
                kernel.release(kernel.create(b"new", sub.node)[1])
            with suppress(OSError):
                assert b"secret" in kernel.list(sub.node)


def test_devices_fifos_and_sockets_are_not_made(protocol: Protocol, folder: Path) -> None:
    with protocol(folder) as kernel:
        for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            with expect(errno.EPERM):
                kernel.make_node(b"node", kind | 0o666)
    assert os.listdir(folder) == ["file"]


def test_fifo_of_the_host_is_seen_and_not_opened(protocol: Protocol, folder: Path) -> None:
    """To open one could hang, or wake a program that waits for it."""
    os.mkfifo(folder / "fifo")
    with protocol(folder) as kernel:
        fifo = kernel.look_up(b"fifo")
        assert stat.S_ISFIFO(fifo.mode)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
            with expect(errno.EPERM):
                kernel.open(fifo.node, flags)
        with expect(errno.EPERM):
            kernel.create(b"fifo")


def test_setuid_never_comes_about(protocol: Protocol, folder: Path) -> None:
    with protocol(folder) as kernel:
        made, _ = kernel.create(b"a", mode=0o6755)
        kernel.set(made.node, MODE, mode=0o106777)
        kernel.make_folder(b"d", mode=0o6777)
        kernel.make_node(b"n", stat.S_IFREG | 0o6755)
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert not any(mode & (stat.S_ISUID | stat.S_ISGID) for mode in modes.values()), modes


def test_setuid_program_of_the_host_is_not_written(protocol: Protocol, folder: Path) -> None:
    program = folder / "program"
    program.write_bytes(b"#!")
    program.chmod(0o4755)
    with protocol(folder) as kernel:
        node = kernel.look_up(b"program").node
        # The guest does not even see the bit.
        assert stat.S_IMODE(kernel.stat(node).mode) == 0o755
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            with expect(errno.EPERM):
                kernel.open(node, flags)
        with expect(errno.EPERM):
            kernel.set(node, SIZE, size=0)
    assert program.read_bytes() == b"#!"


OWNED = """
import os, sys
from pathlib import Path
from tests.vmkit.shares.kernel import ROOT, Shared
from vmkit.shares.daemon import become_owner
folder = Path(sys.argv[1])
(folder / "of root").write_text("x")
(folder / "of root").chmod(0o600)
os.chown(folder, 1234, 1234)
fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
become_owner(fd)
with Shared(folder) as kernel:
    kernel.create(b"made")
    kernel.make_folder(b"folder")
    assert kernel.stat(ROOT).uid == 0
    assert kernel.look_up(b"of root").uid == 65534
    try:
        kernel.read_file(b"of root")
    except PermissionError:
        print(*((folder / name).stat().st_uid for name in ("made", "folder")))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which becomes another user")
def test_root_shares_with_the_power_of_the_folders_owner() -> None:
    """Else a guest could make files of root, and read those of root that lie there."""
    # The other user cannot come to what is below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
        words = [sys.executable, "-c", OWNED, folder]
        done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "1234 1234\n"


def changes(kernel: Kernel, node: int) -> Iterator[tuple[int, int, str, tuple[int, ...], bytes]]:
    """One of each request that changes something."""
    yield fuse.SETATTR, node, "IIQQQQQQIIIIIIII", (MODE, *range(10), 0o777, 0, 0, 0, 0), b""
    yield fuse.SYMLINK, ROOT, "", (), b"link\0target\0"
    yield fuse.MKNOD, ROOT, "IIII", (stat.S_IFREG | 0o644, 0, 0, 0), b"new\0"
    yield fuse.MKDIR, ROOT, "II", (0o755, 0), b"new\0"
    yield fuse.UNLINK, ROOT, "", (), b"file\0"
    yield fuse.RMDIR, ROOT, "", (), b"file\0"
    yield fuse.RENAME, ROOT, "Q", (ROOT,), b"file\0new\0"
    yield fuse.RENAME2, ROOT, "QII", (ROOT, 0, 0), b"file\0new\0"
    yield fuse.LINK, ROOT, "Q", (node,), b"new\0"
    yield fuse.CREATE, ROOT, "IIII", (os.O_RDONLY | os.O_CREAT, 0o644, 0, 0), b"new\0"
    yield fuse.WRITE, node, "QQIIQII", (kernel.open(node), 0, 1, 0, 0, 0, 0), b"x"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        yield fuse.OPEN, node, "II", (flags, 0), b""


def test_read_only_share_is_read_only(folder: Path) -> None:
    before = (folder / "file").stat()
    with Shared(folder, is_read_only=True) as kernel:
        node = kernel.look_up(b"file").node
        for opcode, number, layout, values, tail in changes(kernel, node):
            with expect(errno.EROFS):
                kernel.call(opcode, number, layout, *values, tail=tail)
        assert kernel.read_file(b"file") == b"shared"
    after = (folder / "file").stat()
    assert os.listdir(folder) == ["file"]
    # Not even the time of access, which is the fifth of ten numbers of a stat.
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns, after.st_ctime_ns) == (
        *(before.st_mode, before.st_nlink, before.st_mtime_ns, before.st_ctime_ns),
    )
    assert after.st_atime_ns == before.st_atime_ns


def test_numbers_that_were_not_given_are_refused(folder: Path) -> None:
    with Shared(folder) as kernel:
        for number in (0, 2, 99, (1 << 64) - 1):
            with expect(errno.ESTALE):
                kernel.stat(number)
            with expect(errno.EBADF):
                kernel.read(number)
            with expect(errno.EBADF):
                kernel.write(number, b"x")
        kernel.forget(ROOT, 1 << 40)
        assert kernel.stat(ROOT).node == ROOT


def count_nodes() -> int:
    gc.collect()
    return sum(isinstance(found, KnownFile) for found in gc.get_objects())


def test_guest_that_forgets_the_folders_above_costs_no_more_memory(folder: Path) -> None:
    """Else each of half a million files could hold a thousand folders, which no ceiling counts."""
    deep = folder / "a/b/c/d"
    deep.mkdir(parents=True)
    names = [b"%d" % number for number in range(20)]
    for name in names:
        (deep / os.fsdecode(name)).touch()
    with Shared(folder) as kernel:
        before = count_nodes()
        files = []
        for name in names:
            node = ROOT
            above = [node := kernel.look_up(step, node).node for step in (b"a", b"b", b"c", b"d")]
            files.append(kernel.look_up(name, node))
            for number in above:
                kernel.forget(number, 1)
        assert count_nodes() - before <= len(files)
        # The file has no way any more, until the guest walks there anew.
        with expect(errno.ESTALE):
            kernel.stat(files[0].node)
        assert kernel.walk(b"a/b/c/d/0").node == files[0].node
        kernel.stat(files[0].node)


def test_offsets_beyond_any_file_are_refused(protocol: Protocol, folder: Path) -> None:
    with protocol(folder) as kernel:
        handle = kernel.open(kernel.look_up(b"file").node, os.O_RDWR)
        for offset in (1 << 63, (1 << 64) - 1):
            with expect(errno.EINVAL):
                kernel.read(handle, offset=offset)
            with expect(errno.EINVAL):
                kernel.write(handle, b"x", offset)


def test_request_that_is_too_short_ends_the_share(folder: Path) -> None:
    with Shared(folder) as kernel:
        with pytest.raises(ProtocolError, match="needs 40"):
            kernel.call(fuse.WRITE, ROOT, "Q", 1)
        with pytest.raises(ProtocolError, match="without an end"):
            kernel.call(fuse.LOOKUP, ROOT, tail=b"file")
        with pytest.raises(ProtocolError, match="forgets 9 nodes"):
            kernel.call(42, ROOT, "II", 9, 0, tail=bytes(16))
