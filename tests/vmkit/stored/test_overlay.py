"""A disk on top of another, as QEMU's own programs and our reader see it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vmkit.roots.qcow2 import Qcow2Disk, read_header
from vmkit.stored.overlay import CLUSTER_BYTES, MAX_DISK_BYTES, write_overlay

GIB = 1 << 30


def read_from(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def test_empty_disk_shows_its_base_and_zeros_behind_it(tmp_path: Path) -> None:
    base, disk = tmp_path / "base", tmp_path / "disk.qcow2"
    base.write_bytes(b"root" * 1024)
    write_overlay(disk, 10 * GIB, "base", "raw")
    assert disk.stat().st_mode & 0o777 == 0o600
    assert disk.stat().st_size <= 4 * CLUSTER_BYTES
    header = read_header(lambda at, size: read_from(disk, at, size))
    assert (header.size_bytes, header.backing) == (10 * GIB, "base")
    seen = Qcow2Disk(
        header, lambda at, size: read_from(disk, at, size), backing=lambda at, size: read_from(base, at, size)
    )
    assert seen.read(0, 8192) == b"root" * 1024 + bytes(4096)
    assert seen.read(10 * GIB - 512, 512) == bytes(512)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
@pytest.mark.parametrize("size", [1 << 20, 10 * GIB, MAX_DISK_BYTES])
def test_qemus_programs_find_no_fault_in_it(tmp_path: Path, size: int) -> None:
    (tmp_path / "base").write_bytes(b"root" * 1024)
    disk = tmp_path / "disk.qcow2"
    write_overlay(disk, size, "base", "raw")
    subprocess.run(["qemu-img", "check", disk], check=True, capture_output=True)
    told = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", disk], check=True, capture_output=True).stdout
    )
    assert (told["virtual-size"], told["backing-filename-format"]) == (size, "raw")
    assert Path(told["full-backing-filename"]) == tmp_path / "base"
    # QEMU writes into its last cluster, and so makes new tables.
    write = f"write -P 7 {size - 512} 512"
    subprocess.run(["qemu-io", "-c", write, disk], check=True, capture_output=True)
    subprocess.run(["qemu-img", "check", disk], check=True, capture_output=True)
    assert (tmp_path / "base").read_bytes() == b"root" * 1024


def test_disk_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_overlay(tmp_path / "disk.qcow2", GIB, "base", "raw")
    assert (tmp_path / "disk.qcow2").read_bytes() == b"mine"
