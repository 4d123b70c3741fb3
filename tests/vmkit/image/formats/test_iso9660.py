"""A small ISO 9660: what Linux and blkid read of it, read here by the specification."""

import struct
import subprocess
from pathlib import Path

import pytest

from vmkit.image.formats.iso9660 import SECTOR, render_iso9660

# Of util-linux, which every Debian has.
BLKID = "/sbin/blkid"


def read_files(disk: bytes) -> dict[str, bytes]:
    """The files of the only folder, by the names that Linux shows."""
    descriptor = disk[16 * SECTOR : 17 * SECTOR]
    assert descriptor[:7] == b"\x01CD001\x01"
    assert struct.unpack_from("<I", descriptor, 80)[0] * SECTOR == len(disk)
    root = descriptor[156:190]
    place, size = struct.unpack_from("<I", root, 2)[0], struct.unpack_from("<I", root, 10)[0]
    folder, files, at = disk[place * SECTOR :][:size], {}, 0
    while folder[at]:
        record = folder[at : at + folder[at]]
        start, length = struct.unpack_from("<I", record, 2)[0], struct.unpack_from("<I", record, 10)[0]
        # Each number stands there twice.
        assert struct.unpack_from(">I", record, 6)[0] == start
        assert struct.unpack_from(">I", record, 14)[0] == length
        name = record[33 : 33 + record[32]]
        if not record[25] & 2:
            files[name.removesuffix(b".;1").decode().lower()] = disk[start * SECTOR :][:length]
        at += folder[at]
    return files


@pytest.mark.parametrize("size", [0, 1, SECTOR - 1, SECTOR, SECTOR + 1, 100_000])
def test_files_are_found_by_the_specification(size: int) -> None:
    files = {"user-data": b"#" * size, "meta-data": b"x"}
    assert read_files(render_iso9660("cidata", files)) == files


def test_label_is_found_as_cloud_init_looks_for_it(tmp_path: Path) -> None:
    disk = tmp_path / "seed.iso"
    disk.write_bytes(render_iso9660("cidata", {"user-data": b"", "meta-data": b""}))
    done = subprocess.run([BLKID, "-p", "-o", "export", disk], capture_output=True, text=True, check=True)
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(done.stdout.splitlines())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        render_iso9660("cidata", {f"file-{number}": b"" for number in range(100)})
