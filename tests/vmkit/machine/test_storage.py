"""What vmkit keeps on disk: counted in bytes, and removed where no machine uses it."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.vmkit.machine.conftest import Boot
from vmkit.image.build import BuiltImage
from vmkit.machine.storage import (
    IDLE_S,
    IMAGES,
    LEFTOVERS,
    PACKAGES,
    ROOTS,
    SNAPSHOTS,
    STORED,
    Holding,
    add_up,
    choose_unused,
    list_holdings,
    remove,
)
from vmkit.machine.stored import create_stored
from vmkit.stored.place import list_names

LONG_AGO = time.time() - 30 * 24 * 3600


def make(path: Path, size: int = 8192, *, used: float = LONG_AGO) -> Path:
    """A folder with a file of this size, last used then."""
    path.mkdir(parents=True)
    (path / "root").write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


def find(kind: str) -> list[Path]:
    return [one.path for one in list_holdings() if one.kind == kind]


def clean(*, idle_s: float = IDLE_S) -> dict[str, int]:
    """Removes; returns the number of things that are gone, by their kind."""
    holdings = list_holdings()
    return {
        total.kind: total.removed
        for total in add_up(holdings, remove(choose_unused(holdings, idle_s=idle_s)))
        if total.removed
    }


def test_what_was_used_within_a_week_stays_until_all_is_asked_for(folders: Path) -> None:
    cache = folders / "cache"
    old, new = make(cache / "images/old"), make(cache / "images/new", used=time.time())
    make(cache / "roots/old")
    make(cache / "initrds/old")
    make(cache / "snapshots/made/old")
    named = make(cache / "snapshots/named/mine")
    assert clean() == {IMAGES: 1, ROOTS: 1, "initramfses": 1, SNAPSHOTS: 1}
    assert not old.exists()
    assert clean(idle_s=0) == {IMAGES: 1}
    assert not new.exists()
    assert named.is_dir()
    assert clean(idle_s=0) == {}


def test_bytes_are_those_that_the_disk_gets_back(folders: Path) -> None:
    make(folders / "cache/images/one", 1 << 20)
    with (folders / "cache/images/one/hole").open("wb") as file:
        file.truncate(1 << 30)
    (total,) = add_up(list_holdings(), [])
    assert (total.kind, total.count, total.removed, total.removed_bytes) == (IMAGES, 1, 0, 0)
    assert 1 << 20 <= total.size_bytes < 2 << 20


def test_packages_of_the_last_resolves_stay(folders: Path) -> None:
    cache = folders / "cache"
    (cache / "packages").mkdir()
    (cache / "resolved").mkdir()
    for name in ("known", "unknown"):
        (cache / f"packages/{name}.deb").write_bytes(b"deb")
        os.utime(cache / f"packages/{name}.deb", (LONG_AGO, LONG_AGO))
    (cache / "resolved/a.json").write_text(json.dumps({"records": [{"sha256": "known"}]}))
    (cache / "resolved/broken.json").write_text("{")
    assert clean() == {PACKAGES: 1}
    assert find(PACKAGES) == [cache / "packages/known.deb"]


def test_image_of_a_snapshot_with_a_name_stays(folders: Path) -> None:
    make(folders / "cache/images/needed")
    make(folders / "cache/snapshots/named/mine")
    (folders / "cache/snapshots/named/mine/snapshot.json").write_text(
        json.dumps({"record": {"facts": {"image": "needed"}}})
    )
    assert clean(idle_s=0) == {}


def test_image_of_a_running_machine_stays(folders: Path, image: BuiltImage, boot: Boot) -> None:
    make(folders / "cache/images" / image.digest)
    boot("ready")
    assert clean(idle_s=0) == {}


def test_root_of_a_stored_machine_stays_and_goes_with_it(folders: Path) -> None:
    (folders / "root/etc").mkdir(parents=True)
    (folders / "root/etc/hostname").write_text("mine\n")
    create_stored("web", str(folders / "root"), {})
    (root,) = find(ROOTS)
    assert clean(idle_s=0) == {}
    assert find(STORED) == [folders / "data/machines/web"]
    assert list_names() == ["web"]
    (folders / "data/machines/web/base").unlink()
    assert clean(idle_s=0) == {ROOTS: 1}
    assert not root.exists()


def test_what_killed_programs_left_goes_at_once(folders: Path) -> None:
    made = [
        make(folders / "cache/tmp/half", used=time.time()),
        make(folders / "runtime/machines/dead", used=time.time()),
        make(folders / "data/machines/.new.web", used=time.time()),
    ]
    for path in made[1:]:
        (path / "lock").touch()
    # Another program's folder is none of vmkit's.
    other = make(folders / "runtime/machines/other")
    assert clean() == {LEFTOVERS: 3}
    assert [path.exists() for path in made] == [False] * 3
    assert other.is_dir()


def test_thing_that_another_program_removes_meanwhile_is_gone_too(folders: Path) -> None:
    gone = Holding(IMAGES, folders / "cache/images/gone", 1, 0.0)
    assert remove([gone]) == [gone]


@pytest.mark.parametrize("kept", [True, False])
def test_choice_goes_by_use(kept: bool) -> None:
    one = Holding(IMAGES, Path("/x"), 1, 100.0, is_kept=kept)
    assert choose_unused([one], idle_s=10.0, now=110.0) == ([] if kept else [one])
    assert choose_unused([one], idle_s=10.0, now=109.0) == []
