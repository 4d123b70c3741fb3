"""Shared folders by virtiofs with a real guest and Debian's virtiofsd: what the guest can do, and that nothing in it
waits for a virtiofsd that has ended.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.guest.debian_virtiofsd import lay_out_virtiofsd
from tests.guest.test_shares import SIZE, Guest
from tests.vmkit.shares import kernel as fuse
from tests.vmkit.shares.device_driver import FsDriver
from tests.vmkit.shares.kernel import ROOT, Kernel
from tests.vsh.live import wait_until
from vmkit.machine.virtiofsd import find_sharing_virtiofsd
from vmkit.shares.guard import WantedServer
from vmkit.shares.over_virtiofs import Guard, find_owner, plan_argv
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import LiveShare, read_shares
from vmkit.shares.start import end_share, open_share
from vsh.errors import VshError

# Of the folders that root shares: virtiofsd never runs as root.
USER = 1000
PLACE = "/mnt/by virtiofs"
MOUNTED = "/mnt/by\\\\040virtiofs"
SECRET = b"of the host alone"
# linux/fuse.h: FATTR_MODE, FATTR_UID.
MODE, UID = 1, 2


@pytest.fixture(scope="module", autouse=True)
def _programs(built: None) -> Iterator[None]:
    """virtiofsd on PATH, for any user."""
    folder = Path(tempfile.mkdtemp(prefix="vmkit-virtiofsd-"))
    folder.chmod(0o755)
    try:
        programs = lay_out_virtiofsd(folder)
        trial = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "--mount-proc", "true"]
        user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
        if subprocess.run(trial, capture_output=True, check=False, **user).returncode:  # type: ignore[call-overload]  # of several types
            pytest.skip("this host gives virtiofsd no namespaces for its sandbox")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
            yield
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a user's, below one that this user can enter."""
    above = Path(tempfile.mkdtemp(prefix="vmkit-shared-"))
    above.chmod(0o755)
    (above / "shared").mkdir()
    (above / "outside").mkdir()
    (above / "outside/secret").write_bytes(SECRET)
    give(above / "outside", above / "outside/secret", above / "shared")
    yield above / "shared"
    assert (above / "outside/secret").read_bytes() == SECRET
    shutil.rmtree(above)


def give(*paths: Path) -> None:
    """Makes them the user's."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, USER, USER, follow_symlinks=False)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    give(path)


@pytest.fixture
def guest(ready: str) -> Guest:
    return Guest(ready)


@contextlib.contextmanager
def shared(machine: str, folder: Path, *, read_only: bool = False, place: str = PLACE) -> Iterator[LiveShare]:
    with open_share(machine, SharedPlace(folder, place, read_only), "virtiofs") as share:
        yield share


def find_children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def find_guard(share: LiveShare) -> int:
    """The child of its deputy."""
    (deputy,) = find_children(share.pid)
    (guard,) = find_children(deputy)
    return guard


def find_server(share: LiveShare) -> int:
    """The one of virtiofsd's two processes that does the work."""
    (outer,) = find_children(find_guard(share))
    (inner,) = find_children(outer)
    return inner


def test_files_go_both_ways(ready: str, guest: Guest, folder: Path) -> None:
    data = os.urandom(SIZE)
    write(folder / "big", data)
    (folder / "foreign").touch()
    if os.geteuid() == 0:
        os.chown(folder / "foreign", USER + 1, USER + 1)
    with shared(ready, folder) as share:
        assert share.transport == "virtiofs"
        status, said = guest.run(
            f"cd '{PLACE}' && sha256sum < big && stat -c '%u %g' big && cp big copy && stat -c '%u' foreign &&"
            " echo one > new && echo two >> new && mkdir d && mv new d/moved && ln -s /etc/passwd link &&"
            " ln copy hard && chown 1000:1000 copy && chmod 600 copy && sync"
        )
        foreign = "65534" if os.geteuid() == 0 else "0"
        assert (status, said.split()) == (0, [hashlib.sha256(data).hexdigest(), "-", "0", "0", foreign])
        # Users of the guest are held to the modes.
        assert guest.run(f"cat '{PLACE}/copy'", user="user")[0] == 1
        assert guest.run(f"touch '{PLACE}/x'", user="user")[0] == 1
        write(folder / "later", b"of the host")
        assert guest.run(f"cat '{PLACE}/later'") == (0, "of the host")
        assert guest.run(f"grep ' {MOUNTED} ' /proc/mounts | cut -d' ' -f3")[1] == "virtiofs\n"
    copy = (folder / "copy").stat()
    assert (folder / "copy").read_bytes() == data
    assert copy.st_uid == (USER if os.geteuid() == 0 else os.geteuid())
    assert (copy.st_mode & 0o7777, copy.st_nlink) == (0o600, 2)
    assert (folder / "d/moved").read_text() == "one\ntwo\n"
    assert (folder / "link").readlink() == Path("/etc/passwd")
    assert guest.run("ls -A /mnt") == (0, "")


def test_guest_makes_no_device_and_no_program_of_its_owner(ready: str, guest: Guest, folder: Path) -> None:
    script = f"""
import os, stat
os.chdir({PLACE!r})
open("file", "w").close()
acts = [lambda mode=mode: os.chmod("file", mode) for mode in (0o4755, 0o2755, 0o6755)]
acts += [lambda mode=mode: os.open("new", os.O_CREAT | os.O_WRONLY, mode) for mode in (0o4755, 0o2755)]
acts += [lambda kind=kind: os.mknod("node", kind | 0o644, 0x103) for kind in
         (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG | stat.S_ISUID)]
acts += [lambda: os.setxattr("file", "user.x", b"1")]
for number, act in enumerate(acts):
    try:
        act()
    except OSError:
        continue
    raise SystemExit(f"{{number}} went through")
os.mkdir("folder", 0o6755)
"""
    with shared(ready, folder):
        assert guest.run(f"cat > /tmp/attack << 'END'\n{script}\nEND\npython3 /tmp/attack") == (0, "")
    assert sorted(os.listdir(folder)) == ["file", "folder"]
    for name in ("file", "folder"):
        status = (folder / name).stat()
        assert not status.st_mode & 0o6000
        assert status.st_uid != 0 or os.geteuid() != 0


def test_read_only_share_is_refused_by_the_host(ready: str, guest: Guest, folder: Path) -> None:
    write(folder / "file", b"kept")
    with shared(ready, folder, read_only=True):
        assert guest.run(f"cat '{PLACE}/file'") == (0, "kept")
        for words in ("true", f"mount -o remount,rw '{PLACE}'"):
            status, said = guest.run(f"{words}; echo gone > '{PLACE}/file'")
            assert status != 0
            assert "Read-only file system" in said
    assert (folder / "file").read_bytes() == b"kept"


# A program that reads for as long as it gets no error.
READING = f"cd '{PLACE}' && exec 3< file && echo open && while cat file > /dev/null; do :; done; cat <&3; ls"


@contextlib.contextmanager
def reading(ready: str) -> Iterator["subprocess.Popen[bytes]"]:
    words = [str(BIN / "vsh"), "--vm_name", ready, "--", "sh", "-c", READING]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"open\n"
        yield program


@pytest.mark.parametrize(
    "how", ["revoked", "virtiofsd killed", "both killed", "share killed", "guard killed", "deputy killed"]
)
def test_end_under_use_is_an_error_and_the_next_share_works(ready: str, guest: Guest, folder: Path, how: str) -> None:
    # More than a guest of this size keeps in its memory.
    with (folder / "file").open("wb") as file:
        file.truncate(400 << 20)
    give(folder / "file")
    with shared(ready, folder) as share, reading(ready) as program:
        server = find_server(share)
        if how == "virtiofsd killed":
            os.kill(server, signal.SIGKILL)
        elif how == "both killed":
            for pid in (*find_children(find_guard(share)), server):
                os.kill(pid, signal.SIGKILL)
        elif how == "guard killed":
            os.kill(find_guard(share), signal.SIGKILL)
        elif how == "share killed":
            os.kill(share.pid, signal.SIGKILL)
        else:
            if how == "deputy killed":
                os.kill(find_children(share.pid)[0], signal.SIGKILL)
                # The share goes on.
                assert guest.run(f"head -c 3 '{PLACE}/file' | wc -c") == (0, "3\n")
            end_share(share)
        said, _ = program.communicate(timeout=DEADLINE_S)
        assert said.count(b"not connected") == 3, said
        wait_until(lambda: read_shares(ready) == [], "the share is there still")
        wait_until(lambda: not Path(f"/proc/{server}").exists(), "virtiofsd lives on")
    wait_until(lambda: not guest.has_mount(MOUNTED), "the mount is there still")
    write(folder / "small", b"hello")
    with shared(ready, folder):
        assert guest.run(f"cat '{PLACE}/small'") == (0, "hello")


def test_two_at_once_and_the_next_by_another_transport(ready: str, guest: Guest, vmkit: Run, folder: Path) -> None:
    write(folder / "file", b"hello")
    with shared(ready, folder, place="/mnt/a"), shared(ready, folder, place="/mnt/b", read_only=True):
        assert guest.run("cat /mnt/?/file") == (0, "hellohello")
        with pytest.raises(VshError, match="the machine has no free port: all 2 are taken"):
            shared(ready, folder, place="/mnt/c").__enter__()
        done = vmkit("share", ready, f"{folder}:/mnt/c")
        assert done.stdout.decode() == f"{ready} has {folder} at /mnt/c, by FUSE over vsock\n"
        assert guest.run("cat /mnt/?/file") == (0, "hellohellohello")
        assert vmkit("unshare", ready, "/mnt/c").returncode == 0
        # The guest's own unmount ends a share, and frees its port.
        assert guest.run("umount /mnt/a")[0] == 0
        wait_until(lambda: [one.guest for one in read_shares(ready)] == ["/mnt/b"], "the share is there still")
        with shared(ready, folder, place="/mnt/c"):
            assert guest.run("cat /mnt/?/file") == (0, "hellohello")


def test_pause_keeps_a_share_and_does_not_keep_it_from_ending(
    ready: str, guest: Guest, vmkit: Run, folder: Path
) -> None:
    write(folder / "file", b"hello")
    with shared(ready, folder):
        vmkit("pause", ready)
        vmkit("resume", ready)
        assert guest.run(f"cat '{PLACE}/file'") == (0, "hello")
        vmkit("pause", ready)
        with pytest.raises(VshError, match="paused"):
            shared(ready, folder, place="/mnt/other").__enter__()
    assert read_shares(ready) == []
    vmkit("resume", ready)
    wait_until(lambda: not guest.has_mount(MOUNTED), "the mount is there still")
    with shared(ready, folder):
        assert guest.run(f"cat '{PLACE}/file'") == (0, "hello")


# A guest without a kernel: FUSE's requests as nobody but an attacker makes them.


class RawKernel(Kernel):
    """virtiofsd takes the longer INIT of newer kernels alone."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self._unique = 0
        self.order = "<"
        self.call(fuse.INIT, 0, "16I", 7, 38, 131_072, fuse.OFFERED, *[0] * 12)


@contextlib.contextmanager
def attacking(folder: Path, *, read_only: bool = False) -> Iterator[Kernel]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        owner = find_owner(fd)
    finally:
        os.close(fd)
    found = find_sharing_virtiofsd(folder, 1)
    assert found.program, found.trouble
    with tempfile.TemporaryDirectory(prefix="vmkit-") as made:
        path = f"{made}/qemu"
        guard = Guard(
            WantedServer(plan_argv(found, str(folder), owner, is_read_only=read_only), path, owner.uid, owner.gid)
        )
        with contextlib.ExitStack() as stack:
            stack.callback(guard.end)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(path)
            driver = FsDriver(sock)
            stack.callback(driver.close)
            driver.boot()
            yield RawKernel(driver.ask)


def expect_refusal(act: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Errno"):
        act()


def try_all(*acts: Callable[[], object]) -> None:
    for act in acts:
        with contextlib.suppress(OSError):
            act()


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../outside", b"../outside/secret", b"/etc", b"/proc/self/root"])
def test_names_lead_nowhere(folder: Path, name: bytes) -> None:
    """virtiofsd may take them; its root is the folder, and so they end there."""
    write(folder / "file", b"shared")
    with attacking(folder) as kernel:
        node = kernel.look_up(b"file").node
        with contextlib.suppress(OSError):
            assert kernel.look_up(name).inode == folder.stat().st_ino
        for opcode, numbers, values in [
            (fuse.MKDIR, "II", (0o755, 0)),
            (fuse.MKNOD, "IIII", (stat.S_IFREG | 0o644, 0, 0, 0)),
            (fuse.CREATE, "IIII", (os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644, 0, 0)),
            (fuse.LINK, "Q", (node,)),
            (fuse.UNLINK, "", ()),
            (fuse.RMDIR, "", ()),
        ]:
            try_all(lambda: kernel.call(opcode, ROOT, numbers, *values, tail=name + b"\0"))  # noqa: B023
        try_all(
            lambda: kernel.call(fuse.SYMLINK, ROOT, tail=name + b"\0target\0"),
            lambda: kernel.rename(name, b"stolen"),
            lambda: kernel.rename(b"file", name),
        )
    assert sorted(os.listdir(folder.parent)) == ["outside", "shared"]
    assert os.listdir(folder.parent / "outside") == ["secret"]
    assert not (Path("/etc") / "target").exists()
    stolen = folder / "stolen"
    assert not stolen.is_file() or stolen.read_bytes() != SECRET


def test_folder_that_is_moved_out_leads_no_further(folder: Path) -> None:
    """virtiofsd has it open, so its files stay in reach; what is beside it does not come into reach."""
    (folder / "sub").mkdir()
    give(folder / "sub")
    write(folder / "sub/file", b"was shared")
    with attacking(folder) as kernel:
        sub = kernel.look_up(b"sub")
        (folder / "sub").rename(folder.parent / "outside/sub")
        assert kernel.look_up(b"file", sub.node).size == 10
        for name in (b"../secret", b"../../outside/secret", b".."):
            expect_refusal(lambda: kernel.look_up(name, sub.node))  # noqa: B023
            expect_refusal(lambda: kernel.create(name + b"/new", sub.node))  # noqa: B023
    assert sorted(os.listdir(folder.parent / "outside")) == ["secret", "sub"]


@pytest.mark.parametrize("target", ["../outside", "/", "/proc/self/root", "/proc/1/root", "outside"])
def test_links_lead_nowhere(folder: Path, target: str) -> None:
    target = str(folder.parent / "outside") if target == "outside" else target
    with attacking(folder) as kernel:
        kernel.call(fuse.SYMLINK, ROOT, tail=b"link\0" + os.fsencode(target) + b"\0")
        link = kernel.look_up(b"link")
        assert stat.S_ISLNK(link.mode)
        for name in (b"secret", b"etc", b"shared"):
            expect_refusal(lambda: kernel.look_up(name, link.node))  # noqa: B023
            expect_refusal(lambda: kernel.create(name, link.node))  # noqa: B023
        expect_refusal(lambda: kernel.open(link.node))
        expect_refusal(lambda: kernel.list(link.node))
        expect_refusal(lambda: kernel.create(b"link", flags=os.O_RDWR | os.O_TRUNC))


def test_modes_and_owners_are_the_sharing_users(folder: Path) -> None:
    write(folder / "file", b"shared")
    write(folder / "program", b"#!/bin/sh\n")
    (folder / "program").chmod(0o4755)
    os.mkfifo(folder / "fifo")
    give(folder / "fifo")
    with attacking(folder) as kernel:
        node = kernel.look_up(b"file").node
        for mode in (0o4755, 0o2755, 0o6755):
            expect_refusal(lambda: kernel.set(node, MODE, mode=mode))  # noqa: B023
            expect_refusal(lambda: kernel.create(b"made", mode=mode))  # noqa: B023
        for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            expect_refusal(lambda: kernel.call(fuse.MKNOD, ROOT, "IIII", kind | 0o666, 0x103, 0, 0, tail=b"made\0"))  # noqa: B023
        kernel.set(node, UID)
        # What the guest writes into a program of its user's does not run as that user.
        program = kernel.look_up(b"program").node
        handle, data = kernel.open(program, os.O_WRONLY), b"#!/bin/false\n"
        kernel.call(fuse.WRITE, program, "QQIIQII", handle, 0, len(data), 0, 0, 0, 0, tail=data)
        expect_refusal(lambda: kernel.open(kernel.look_up(b"fifo").node, os.O_RDONLY))
    assert (folder / "file").stat().st_uid == folder.stat().st_uid
    assert (folder / "program").stat().st_mode & 0o7777 == 0o755
    assert sorted(os.listdir(folder)) == ["fifo", "file", "program"]


def test_read_only_folder_is_not_changed_by_raw_requests(folder: Path) -> None:
    write(folder / "file", b"kept")
    with attacking(folder, read_only=True) as kernel:
        node = kernel.look_up(b"file").node
        for act in (
            lambda: kernel.open(node, os.O_WRONLY),
            lambda: kernel.create(b"new"),
            lambda: kernel.make_folder(b"new"),
            lambda: kernel.set(node, MODE, mode=0o600),
            lambda: kernel.rename(b"file", b"new"),
            lambda: kernel.call(fuse.UNLINK, ROOT, tail=b"file\0"),
            lambda: kernel.call(fuse.LINK, ROOT, "Q", node, tail=b"new\0"),
        ):
            expect_refusal(act)
        assert kernel.call(fuse.READ, node, "QQIIQII", kernel.open(node), 0, 4, 0, 0, 0, 0) == b"kept"
    assert os.listdir(folder) == ["file"]


def test_requests_that_are_none_are_answered(folder: Path) -> None:
    with attacking(folder) as kernel:
        for opcode in range(64):
            for body in (b"", b"\xff" * 8, b"\xff" * 200):
                if opcode in (fuse.FORGET, fuse.INIT, 36, 38, 42):
                    continue
                with contextlib.suppress(OSError, struct.error):
                    kernel.call(opcode, ROOT, tail=body)
        with pytest.raises(OSError, match="Errno") as caught:
            kernel.look_up(b"none")
        # virtiofsd ends for some of them, and none waits then either.
        assert caught.value.errno in (errno.ENOENT, errno.ENOTCONN)
