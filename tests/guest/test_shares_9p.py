"""Shared folders in a guest whose kernel has 9P and no FUSE: they come by 9P, carry files, and go."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmkit
from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.guest.test_shares import Guest
from tests.vsh.live import wait_until
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import LiveShare, read_shares
from vmkit.shares.start import open_share

# The image's own kernel has no 9P. This one is that of test_kernel_tree.
RECIPE = """
extends = "tiny"
kernel = "linux-image-amd64"
kernel_suite = "bookworm"
modules_available = ["9p", "9pnet_fd"]
"""
NAME = "ninep"
PLACE = "/mnt/shared folder"
MOUNT = "/mnt/shared\\\\040folder"
# More than one message may have, and no whole number of pages.
SIZE = 1_000_001


@pytest.fixture(scope="module")
def stock(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "stock.toml"
    recipe.write_text(RECIPE)
    with vmkit.Machine(str(recipe), name=NAME, accelerator="tcg", backend="user", memory="512M", timeout_s=DEADLINE_S):
        yield NAME


@pytest.fixture
def guest(stock: str) -> Guest:
    return Guest(stock)


@contextmanager
def shared(folder: Path, *, read_only: bool = False) -> Iterator[LiveShare]:
    with open_share(NAME, SharedPlace(folder, PLACE, read_only), "9p") as share:
        yield share


def test_kernel_without_fuse_has_its_share_by_9p(stock: str, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    refused = vmkit("share", "--by", "fuse", stock, f"{tmp_path}:/mnt/a")
    assert refused.returncode != 0
    assert b"this guest's kernel has no FUSE" in refused.stderr
    done = vmkit("share", stock, f"{tmp_path}:/mnt/a:ro")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{stock} has {tmp_path} at /mnt/a, read-only, by 9P over vsock\n"
    assert vsh("--vm_name", stock, "--", "cat", "/mnt/a/file").stdout == b"hello"
    assert b"9P over vsock" in vmkit("shares", stock).stdout
    assert vmkit("unshare", stock, "/mnt/a").returncode == 0
    assert vmkit("shares", stock, "--json").stdout == b"[]\n"


def test_files_go_both_ways_by_9p(guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "many").mkdir()
    for number in range(200):
        (tmp_path / f"many/{number}").touch()
    with shared(tmp_path):
        status, said = guest.run(
            f"cd '{PLACE}' && sha256sum < big && ls many | wc -l && stat -c '%u %g' big && cp big copy &&"
            " echo one > new && echo two >> new && mv new many/moved && ln -s /etc/passwd link && ln copy hard &&"
            " chown 1000:1000 copy && chmod 600 copy && mkdir d && rmdir d && rm many/7 && sync"
        )
        assert (status, said.split()) == (0, [hashlib.sha256(data).hexdigest(), "-", "200", "0", "0"])
        # Users of the guest are held to the modes.
        assert guest.run(f"cat '{PLACE}/copy'", user="user")[0] == 1
        assert guest.run(f"touch '{PLACE}/x'", user="user")[0] == 1
        # What a program of this host writes is seen at once.
        (tmp_path / "later").write_text("of the host")
        assert guest.run(f"cat '{PLACE}/later'") == (0, "of the host")
        (tmp_path / "later").write_text("once more")
        assert guest.run(f"cat '{PLACE}/later'") == (0, "once more")
        # A file without a name, and one that is mapped; a lock holds among programs of the guest.
        script = (
            "import fcntl, mmap, os; f = open('open', 'w+b'); os.unlink('open'); f.write(b'12345'); f.flush();"
            " f.truncate(3); print(os.fstat(f.fileno()).st_size, os.fstat(f.fileno()).st_nlink);"
            " fcntl.flock(f, fcntl.LOCK_EX); g = open('big', 'rb');"
            " print(len(mmap.mmap(g.fileno(), 0, prot=mmap.PROT_READ)[:]))"
        )
        assert guest.run(f'cd "{PLACE}" && python3 -c "{script}"') == (0, f"3 0\n{SIZE}\n")
    copy = (tmp_path / "copy").stat()
    assert (tmp_path / "copy").read_bytes() == data
    assert (copy.st_uid, copy.st_mode & 0o7777, copy.st_nlink) == (os.geteuid(), 0o600, 2)
    assert (tmp_path / "many/moved").read_text() == "one\ntwo\n"
    assert (tmp_path / "link").readlink() == Path("/etc/passwd")
    assert not {"x", "open"} & set(os.listdir(tmp_path))


def test_guest_makes_no_device_and_writes_no_read_only_share_by_9p(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with shared(tmp_path):
        assert guest.run(f"mknod '{PLACE}/null' c 1 3")[0] == 1
        assert guest.run(f"mkfifo '{PLACE}/fifo'")[0] == 1
        assert guest.run(f"cd '{PLACE}' && cp /bin/busybox p && chmod 6755 p && stat -c %a p") == (0, "755\n")
    with shared(tmp_path, read_only=True):
        assert guest.run(f"cat '{PLACE}/file'") == (0, "kept")
        # The mount says so, and behind it this host.
        for words in ("true", f"mount -o remount,rw '{PLACE}'"):
            status, said = guest.run(f"{words}; echo gone > '{PLACE}/file'")
            assert status != 0
            assert "Read-only file system" in said
    assert (tmp_path / "file").read_text() == "kept"


def test_revoked_share_gives_errors_and_leaves_nothing_by_9p(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    script = f"cd '{PLACE}' && exec 3< file && echo open && read go; cat <&3; echo $?; ls; echo $?"
    with shared(tmp_path):
        program = subprocess.Popen(
            [BIN / "vsh", "--vm_name", NAME, "--", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == b"open\n"
    wait_until(lambda: not guest.has_mount(MOUNT), "the mount is there still")
    said, _ = program.communicate(b"go\n", timeout=DEADLINE_S)
    assert [line for line in said.splitlines() if line.isdigit()] == [b"1", b"1"], said
    # The place itself was made for the share.
    assert guest.run("ls -A /mnt") == (0, "")


def test_guest_ends_its_share_by_9p(guest: Guest, tmp_path: Path) -> None:
    with shared(tmp_path):
        assert guest.run(f"umount '{PLACE}'") == (0, "")
        wait_until(lambda: read_shares(NAME) == [], "the share is there still")
    # A file that is open has the file system until it is closed.
    (tmp_path / "file").write_text("hello")
    with shared(tmp_path):
        assert guest.run(f"exec 3< '{PLACE}/file'; umount -l '{PLACE}' && cat <&3") == (0, "hello")
        wait_until(lambda: read_shares(NAME) == [], "the share is there still")
    wait_until(lambda: guest.run("ls -A /mnt") == (0, ""), "the place is there still")


def test_killed_ends_are_errors_and_the_next_share_works_by_9p(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    read = f"cat '{PLACE}'/file"
    with shared(tmp_path) as share:
        os.kill(share.pid, signal.SIGKILL)
        wait_until(lambda: not guest.has_mount(MOUNT), "the mount is there still")
        assert read_shares(NAME) == []
    with shared(tmp_path):
        # vshd's own process, as the kernel kills one. The kernel has the connection itself, and goes on.
        status, said = guest.run(
            "for p in /proc/[0-9]*; do ls -l $p/fd 2> /dev/null | grep -q anon_inode:inotify && break; done;"
            f" kill -9 ${{p#/proc/}} && {read}"
        )
        assert (status, said) == (0, "hello")
    # Then the end of the share leaves a mount that answers errors, which the next share takes away.
    status, said = guest.run(read)
    assert status != 0, said
    with shared(tmp_path):
        assert guest.run(read) == (0, "hello")
