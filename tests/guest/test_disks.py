"""Disks of the host's in a guest, and gdb looking into one, for real."""

import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmkit as vmkit_package
from tests.descriptors import read_descriptors
from tests.guest.conftest import Run
from vmkit.errors import MachineError
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """16 MiB with a file system and a file in it."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/note").write_text("from the host\n")
    path = tmp_path / "a disk, with a comma.img"
    words = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(tmp_path / "files"), str(path), "16M"]
    subprocess.run(words, check=True, capture_output=True)
    return path


def test_disks_are_read_and_written_as_asked(up: Run, vsh: Run, vmkit: Run, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    shutil.copy(disk, other)
    before = disk.read_bytes()
    done = up("--name", "disks", "--disk", str(disk), "--rwdisk", str(other))
    assert done.returncode == 0, done.stderr.decode()
    script = """
set -e
mount -t ext4 -o ro /dev/vda /mnt; cat /mnt/note; umount /mnt
! dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null
mount -t ext4 /dev/vdb /mnt; echo from the guest > /mnt/note; umount /mnt
cat /sys/block/vd?/serial
"""
    ran = vsh("--vm_name", "disks", "--", "sh", "-c", script)
    assert (ran.returncode, ran.stdout) == (0, b"from the host\nvmkit-0vmkit-1"), ran.stderr.decode()
    assert vmkit("down", "disks").returncode == 0
    assert disk.read_bytes() == before
    told = subprocess.run(["/usr/sbin/debugfs", "-R", "cat note", str(other)], check=True, capture_output=True)
    assert told.stdout == b"from the guest\n"


def test_disk_that_may_be_written_is_one_machine_s_own(built: None, folders: Path, disk: Path) -> None:
    with vmkit_package.Machine(rwdisks=[disk], accelerator="tcg", name="owner"):
        wishes: tuple[dict[str, Any], ...] = ({"disks": [disk]}, {"rwdisks": [disk]})
        for options in wishes:
            other = vmkit_package.Machine(accelerator="tcg", name="other", **options)
            with pytest.raises(MachineError, match=r"the disk .*comma\.img is in use by another machine or program"):
                other.start()
    with (
        vmkit_package.Machine(disks=[disk], accelerator="tcg", name="one"),
        vmkit_package.Machine(disks=[disk], accelerator="tcg", name="two") as two,
    ):
        assert two.run(["cat", "/sys/block/vda/ro"]).stdout == b"1\n"


def test_root_can_be_replaced(folders: Path, tmp_path: Path) -> None:
    """By one of a user's own, here the image's with a file more; it is not written either."""
    built = build_image(load_image("debian"))
    assert built.root is not None
    root = tmp_path / "root.img"
    shutil.copy(built.root, root)
    (tmp_path / "word").write_text("mine\n")
    words = ["/usr/sbin/debugfs", "-w", "-R", f"write {tmp_path / 'word'} word", str(root)]
    subprocess.run(words, check=True, capture_output=True)
    before = root.read_bytes()
    with vmkit_package.Machine("debian", root=root, accelerator="tcg", name="replaced") as machine:
        assert machine.run(["sh", "-c", "cat /word; touch /new"]).stdout == b"mine\n"
    assert root.read_bytes() == before


def read_until(gdb: socket.socket, answer: bytes) -> None:
    """Reads QEMU's packets up to the one that starts with answer; its acknowledgements stand between them."""
    received = b""
    while answer not in received:
        chunk = gdb.recv(1024)
        assert chunk, received
        received += chunk


def test_gdb_socket_speaks_gdbs_protocol_and_is_of_its_owner_alone(built: None, folders: Path) -> None:
    with vmkit_package.Machine(gdb=True, accelerator="tcg", name="debugged") as machine:
        path = machine.directory / "gdb.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as gdb:
            gdb.settimeout(60)
            gdb.connect(str(path))
            # QEMU stops the guest when gdb connects. It may report that (T02, SIGINT) before it answers (T05, SIGTRAP).
            gdb.sendall(b"$?#3f")
            read_until(gdb, b"$T05")
            gdb.sendall(b"+$D#44")
            read_until(gdb, b"$OK")
        # It goes on when gdb has left, and another gdb may come.
        assert machine.run(["echo", "alive"], timeout=60).stdout == b"alive\n"
        with socket.socket(socket.AF_UNIX) as gdb:
            gdb.connect(str(path))
        monitor = machine.started.monitor.pid
        assert not any("gdb" in file for _, file in read_descriptors(monitor))


def test_gdb_looks_into_a_guest(built: None, folders: Path) -> None:
    assert shutil.which("gdb"), "the package gdb is missing: make test-packages"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with vmkit_package.Machine(gdb_port=port, accelerator="tcg", name="debugged") as machine:
        words = ["gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64"]
        words += ["-ex", f"target remote 127.0.0.1:{port}", "-ex", "info registers rip cr0", "-ex", "detach"]
        done = subprocess.run(words, check=False, capture_output=True, timeout=60, text=True)
        assert re.search(r"^rip\s+0x[0-9a-f]+", done.stdout, re.MULTILINE), done.stdout + done.stderr
        assert re.search(r"^cr0\s+0x80\w+", done.stdout, re.MULTILINE)
        # It goes on when gdb has left.
        assert machine.run(["echo", "alive"], timeout=60).stdout == b"alive\n"
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        ends = re.findall(rf"([0-9A-F]+):{port:04X} 0+:0000 0A", listening)
        assert ends == ["0100007F"]
