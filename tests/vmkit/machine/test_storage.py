"""What vmkit keeps on disk: counted in bytes, and removed where no machine uses it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.other_user import SOMEBODY_ELSE
from tests.vmkit.machine.conftest import Boot
from vmkit.errors import HostError
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

KEYS = [f"{number:064x}" for number in range(1, 9)]
# Not so long that a sweep of the cache removes it.
LONG_AGO = time.time() - 20 * 24 * 3600


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
    yesterday = time.time() - 24 * 3600
    old, new = make(cache / "images" / KEYS[0]), make(cache / "images" / KEYS[1], used=yesterday)
    newest = make(cache / "images" / KEYS[2], used=time.time())
    make(cache / "roots" / KEYS[0])
    make(cache / "initrds" / KEYS[0])
    make(cache / "snapshots/made" / KEYS[0])
    named = make(cache / "snapshots/named/mine")
    assert clean() == {IMAGES: 1, ROOTS: 1, "initramfses": 1, SNAPSHOTS: 1}
    assert not old.exists()
    assert clean(idle_s=0) == {IMAGES: 1}
    assert not new.exists()
    # A start may have taken it, and say so only when QEMU starts.
    assert newest.is_dir()
    assert named.is_dir()
    assert clean(idle_s=0) == {}


def test_what_is_used_between_the_look_and_the_removal_stays(folders: Path) -> None:
    cache = folders / "cache"
    used, linked = make(cache / "roots" / KEYS[0]), make(cache / "roots" / KEYS[1])
    chosen = choose_unused(list_holdings())
    os.utime(used)
    os.link(linked / "root", folders / "base")
    assert (len(chosen), remove(chosen)) == (2, [])
    assert (used.is_dir(), linked.is_dir()) == (True, True)


def test_what_vmkit_did_not_make_stays(folders: Path) -> None:
    others = [make(folders / "cache" / kind / "photos") for kind in ("images", "roots", "initrds", "snapshots/made")]
    assert clean(idle_s=0) == {}
    assert all(other.is_dir() for other in others)


def test_nothing_behind_a_link_is_removed(folders: Path) -> None:
    victim = make(folders / "victim" / KEYS[0])
    (folders / "cache/snapshots").mkdir()
    (folders / "cache/snapshots/made").symlink_to(victim.parent)
    (folders / "cache/images").symlink_to(victim.parent)
    assert clean(idle_s=0) == {}
    assert victim.is_dir()


@pytest.mark.root
def test_snapshots_folder_of_another_user_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = folders / "foreign"
    snapshot = make(foreign / "made" / KEYS[0])
    os.chown(foreign, SOMEBODY_ELSE, SOMEBODY_ELSE)
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(foreign))
    one = Holding(SNAPSHOTS, snapshot, 1, 0.0)
    for look in (list_holdings, lambda: remove([one])):
        with pytest.raises(HostError, match=r"the snapshots folder .* belongs to another user"):
            look()
    assert snapshot.is_dir()


def test_folder_that_vanishes_while_it_is_measured_counts_nothing(folders: Path) -> None:
    """Another program removes and makes folders in it all the time."""
    place = make(folders / "cache/tmp/busy")
    (place / "a/b/c").mkdir(parents=True)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "place = Path(sys.argv[1])\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for n in range(20):\n"
        "        (place / f'x{n}/y/z').mkdir(parents=True, exist_ok=True)\n"
        "    for n in range(20):\n"
        "        [(place / f'x{n}' / part).rmdir() for part in ('y/z', 'y', '')]\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            for _ in range(200):
                assert [one.kind for one in list_holdings()] == [LEFTOVERS]
        finally:
            other.kill()


def test_bytes_are_those_that_the_disk_gets_back(folders: Path) -> None:
    image = make(folders / "cache/images" / KEYS[0], 1 << 20)
    with (image / "hole").open("wb") as file:
        file.truncate(1 << 30)
    (total,) = add_up(list_holdings(), [])
    assert (total.kind, total.count, total.removed, total.removed_bytes) == (IMAGES, 1, 0, 0)
    assert 1 << 20 <= total.size_bytes < 2 << 20


def test_packages_of_the_last_resolves_stay(folders: Path) -> None:
    cache = folders / "cache"
    (cache / "packages").mkdir()
    (cache / "resolved").mkdir()
    known, twin, unknown = (cache / f"packages/{key}.deb" for key in KEYS[:3])
    for path in (known, twin, unknown):
        path.write_bytes(b"deb")
        os.utime(path, (LONG_AGO, LONG_AGO))
    lock = {"records": [{"sha256": known.stem}], "twins": [{"sha256": twin.stem}]}
    (cache / "resolved/a.json").write_text(json.dumps(lock))
    (cache / "resolved/broken.json").write_text("{")
    assert clean() == {PACKAGES: 1}
    assert find(PACKAGES) == [known, twin]


def test_image_of_a_snapshot_with_a_name_stays(folders: Path) -> None:
    make(folders / "cache/images" / KEYS[0])
    make(folders / "cache/snapshots/named/mine")
    (folders / "cache/snapshots/named/mine/snapshot.json").write_text(
        json.dumps({"record": {"facts": {"image": KEYS[0]}}})
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
    os.utime(root, (LONG_AGO, LONG_AGO))
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
    gone = Holding(IMAGES, folders / "cache/images" / KEYS[0], 1, 0.0)
    assert remove([gone]) == [gone]


@pytest.mark.parametrize("kept", [True, False])
def test_choice_goes_by_use(kept: bool) -> None:
    one = Holding(IMAGES, Path("/x"), 1, 100.0, is_kept=kept)
    assert choose_unused([one], idle_s=10.0, now=110.0) == ([] if kept else [one])
    assert choose_unused([one], idle_s=10.0, now=109.0) == []
