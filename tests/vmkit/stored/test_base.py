"""What a stored machine's disk is based on: kept when the cache goes, and recognised when it changes."""

import os
from pathlib import Path

import pytest

from vmkit.errors import MachineError
from vmkit.stored.base import copy_sparsely, describe_base, require_same, take_base


def test_base_from_the_cache_stays_when_the_cache_goes(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"root")
    (tmp_path / "web").mkdir()
    base = take_base(tmp_path / "root", tmp_path / "web", "raw")
    # It takes no room of its own.
    assert (tmp_path / "root").stat().st_ino == (tmp_path / "web/base").stat().st_ino
    (tmp_path / "root").unlink()
    assert require_same(base, tmp_path / "web", "web").read_bytes() == b"root"


def test_copy_has_the_holes_of_its_original(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with old.open("wb") as file:
        file.truncate(64 << 20)
        for at in (0, 8 << 20, (64 << 20) - 5):
            file.seek(at)
            file.write(b"hello")
    copy_sparsely(old, new)
    assert new.read_bytes() == old.read_bytes()
    assert new.stat().st_blocks <= old.stat().st_blocks + 64
    with pytest.raises(FileExistsError):
        copy_sparsely(tmp_path / "old", new)


def test_hole_alone_is_copied(tmp_path: Path) -> None:
    with (tmp_path / "old").open("wb") as file:
        file.truncate(1 << 20)
    copy_sparsely(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == bytes(1 << 20)


def test_base_that_changed_or_is_gone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"root")
    base = describe_base(disk, str(disk), "raw")
    assert require_same(base, tmp_path / "web", "web") == disk
    # As when a program wrote into it: the same size at another time.
    os.utime(disk, ns=(0, base.mtime_ns + 1))
    with pytest.raises(
        MachineError, match=r"the base of 'web' changed since the machine was created: .*disk\.img"
    ) as caught:
        require_same(base, tmp_path / "web", "web")
    assert "vmkit rm web" in caught.value.hint
    os.utime(disk, ns=(0, base.mtime_ns))
    require_same(base, tmp_path / "web", "web")
    disk.unlink()
    with pytest.raises(MachineError, match=r"the base of 'web' cannot be read: .*No such file"):
        require_same(base, tmp_path / "web", "web")
