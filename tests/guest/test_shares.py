"""Shared folders with a real guest: they come, carry files, and go, and nobody in the guest is left hanging."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.vsh.live import wait_until
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import LiveShare, read_shares
from vmkit.shares.start import open_share
from vsh.address import address_of
from vsh.client import Client
from vsh.errors import VshError
from vsh.registry import find_machine

# More than one message may have, and no whole number of pages.
SIZE = 5_000_001


class Guest:
    """Runs commands of a shell."""

    def __init__(self, name: str) -> None:
        machine = find_machine(name=name)
        assert machine is not None
        self._client = Client(address_of(machine))

    def run(self, script: str, user: str = "") -> tuple[int, str]:
        done = self._client.run(["sh", "-c", script], text=True, check=False, user=user, timeout=DEADLINE_S)
        return done.returncode, done.stdout + done.stderr

    def has_mount(self, path: str) -> bool:
        return self.run(f"grep -q ' {path} ' /proc/mounts")[0] == 0


@pytest.fixture
def guest(ready: str) -> Guest:
    return Guest(ready)


@contextmanager
def shared(machine: str, folder: Path, *, read_only: bool = False) -> Iterator[LiveShare]:
    with open_share(machine, SharedPlace(folder, "/mnt/shared folder", read_only), "fuse") as share:
        yield share


def test_files_go_both_ways(ready: str, guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "many").mkdir()
    for number in range(200):
        (tmp_path / f"many/{number}").touch()
    with shared(ready, tmp_path):
        status, said = guest.run(
            "cd '/mnt/shared folder' && sha256sum < big && ls many | wc -l && stat -c '%u %g' big && cp big copy &&"
            " echo one > new && echo two >> new && mv new many/moved && ln -s /etc/passwd link && ln copy hard &&"
            " chown 1000:1000 copy && chmod 600 copy && mkdir d && rmdir d && rm many/7 && sync"
        )
        assert (status, said.split()) == (0, [hashlib.sha256(data).hexdigest(), "-", "200", "0", "0"])
        # The kernel reads large files in messages as large as one may be.
        script = "grep ' fuse.vmkit ' /proc/self/mountinfo | cut -d' ' -f3"
        assert guest.run(f"cat /sys/class/bdi/$({script})/read_ahead_kb") == (0, "1024\n")
        # Users of the guest are held to the modes.
        assert guest.run("cat '/mnt/shared folder/copy'", user="user")[0] == 1
        assert guest.run("touch '/mnt/shared folder/x'", user="user")[0] == 1
        # What a program of this host writes is seen at once where it was not seen before.
        (tmp_path / "later").write_text("of the host")
        assert guest.run("cat '/mnt/shared folder/later'") == (0, "of the host")
    copy = (tmp_path / "copy").stat()
    assert (tmp_path / "copy").read_bytes() == data
    assert (copy.st_uid, copy.st_mode & 0o7777, copy.st_nlink) == (os.geteuid(), 0o600, 2)
    assert (tmp_path / "many/moved").read_text() == "one\ntwo\n"
    assert (tmp_path / "link").readlink() == Path("/etc/passwd")
    assert not (tmp_path / "many/7").exists()
    assert not (tmp_path / "x").exists()


def test_guest_makes_no_device_and_writes_no_read_only_share(ready: str, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with shared(ready, tmp_path):
        assert guest.run("mknod '/mnt/shared folder/null' c 1 3")[0] == 1
        assert guest.run("mkfifo '/mnt/shared folder/fifo'")[0] == 1
        assert guest.run("cd '/mnt/shared folder' && cp /bin/busybox p && chmod 6755 p && stat -c %a p") == (0, "755\n")
    with shared(ready, tmp_path, read_only=True):
        assert guest.run("cat '/mnt/shared folder/file'") == (0, "kept")
        # The mount says so, and behind it this host.
        for words in ("true", "mount -o remount,rw '/mnt/shared folder'"):
            status, said = guest.run(f"{words}; echo gone > '/mnt/shared folder/file'")
            assert status != 0
            assert "Read-only file system" in said
    assert (tmp_path / "file").read_text() == "kept"


def test_revoked_share_gives_errors_and_leaves_nothing(ready: str, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    script = "cd '/mnt/shared folder' && exec 3< file && echo open && read go; cat <&3; echo $?; ls; echo $?"
    with shared(ready, tmp_path):
        program = subprocess.Popen(
            [BIN / "vsh", "--vm_name", ready, "--", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == b"open\n"
    wait_until(lambda: not guest.has_mount("/mnt/shared\\\\040folder"), "the mount is there still")
    said, _ = program.communicate(b"go\n", timeout=DEADLINE_S)
    assert said.count(b"not connected") == 2, said
    # The place itself was made for the share.
    assert guest.run("ls -A /mnt") == (0, "")


def test_killed_ends_are_errors_and_the_next_share_works(ready: str, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    path = "'/mnt/shared folder'/file"
    with shared(ready, tmp_path) as share:
        os.kill(share.pid, signal.SIGKILL)
        wait_until(lambda: not guest.has_mount("/mnt/shared\\\\040folder"), "the mount is there still")
        assert read_shares(ready) == []
    with shared(ready, tmp_path):
        assert guest.run(f"cat {path}") == (0, "hello")
        # vshd's own process, as the kernel kills one, while the kernel remembers the folder's attributes for a second.
        status, said = guest.run(
            "for p in /proc/[0-9]*; do ls -l $p/fd 2> /dev/null | grep -q /dev/fuse && break; done;"
            f" stat '/mnt/shared folder'; kill -9 ${{p#/proc/}}; cat {path}"
        )
        assert status != 0
        # The first is the error of a request that the kernel had begun while the process ended.
        assert "Software caused connection abort" in said or "not connected" in said
        wait_until(lambda: read_shares(ready) == [], "the share is there still")
    with shared(ready, tmp_path):
        assert guest.run(f"cat {path}") == (0, "hello")


def test_place_of_the_guest_that_cannot_be_is_refused(ready: str, guest: Guest, tmp_path: Path) -> None:
    for place, reason in [("/proc", "is a mount point already"), ("/etc/passwd/x", "cannot make the folder")]:
        with pytest.raises(VshError, match=reason), open_share(ready, SharedPlace(tmp_path, place), "fuse"):
            pass
    assert read_shares(ready) == []


def test_verbs_share_and_unshare(ready: str, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    done = vmkit("share", ready, f"{tmp_path}:/mnt/a:ro", f"{tmp_path}:/mnt/b", "--by", "fuse")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [
        f"{ready} has {tmp_path} at /mnt/a, read-only, by FUSE over vsock",
        f"{ready} has {tmp_path} at /mnt/b, by FUSE over vsock",
    ]
    assert vsh("--vm_name", ready, "--", "cat", "/mnt/a/file").stdout == b"hello"
    nine = vmkit("share", "--by", "9p", ready, f"{tmp_path}:/mnt/c")
    assert nine.returncode != 0
    assert b"this guest's kernel has no 9P" in nine.stderr
    twice = vmkit("share", ready, f"{tmp_path}:/mnt/a")
    assert twice.returncode != 0
    assert b"already" in twice.stderr
    both = vmkit("unshare", ready, str(tmp_path))
    assert b"2 times" in both.stderr
    assert vmkit("unshare", ready, "/mnt/a").returncode == 0
    assert vmkit("unshare", ready, str(tmp_path)).returncode == 0
    assert vmkit("shares", ready, "--json").stdout == b"[]\n"
