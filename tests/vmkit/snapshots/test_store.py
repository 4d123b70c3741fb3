"""Snapshots on disk: what is read, what is refused as damaged or another user's, and what is removed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.snapshots.make import make_snapshot
from vmkit.errors import ConfigError
from vmkit.snapshots.key import make_key
from vmkit.snapshots.pages import DamagedError
from vmkit.snapshots.store import FILES, MEMORY, RECORD, STATE, Store, check_state, read_snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "snapshots")


def make(store: Store, number: int = 1, **fields: Any) -> Path:
    facts = {"number": number}
    return make_snapshot(store.find_made(make_key(facts)), facts, **fields)


def test_snapshot_is_read_as_it_was_written(store: Store) -> None:
    folder = make(store)
    snapshot = read_snapshot(folder)
    check_state(snapshot)
    assert snapshot.record.facts == {"number": 1}
    assert (snapshot.name, snapshot.is_named) == (make_key({"number": 1})[:12], False)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


@pytest.mark.parametrize("name", [RECORD, MEMORY, STATE])
@pytest.mark.parametrize("how", ["missing", "empty", "longer", "flipped"])
def test_damage_is_found_before_anything_runs(store: Store, name: str, how: str) -> None:
    folder = make(store)
    path = folder / name
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(data + b"x")
        case "flipped":
            path.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    if name == MEMORY and how == "flipped":
        # The copy finds it, as it goes: tests/vmkit/snapshots/test_pages.py.
        return
    with pytest.raises(DamagedError):
        check_state(read_snapshot(folder))


@pytest.mark.parametrize(
    "text", [b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"record": {}, "sha256": ""}', b'{"record": 1, "sha256": 2}']
)
def test_record_that_is_none_is_damage(store: Store, text: bytes) -> None:
    folder = make(store)
    (folder / RECORD).write_bytes(text)
    with pytest.raises(DamagedError):
        read_snapshot(folder)


def test_record_of_other_fields_is_damage(store: Store) -> None:
    """As another version of vmkit would write it."""
    folder = make(store)
    value = json.loads((folder / RECORD).read_bytes())
    value["record"]["more"] = 1
    (folder / RECORD).write_text(json.dumps(value))
    with pytest.raises(DamagedError, match="another checksum"):
        read_snapshot(folder)


@pytest.mark.parametrize("name", [RECORD, STATE, MEMORY, "."])
def test_files_that_others_can_read_are_refused(store: Store, name: str) -> None:
    folder = make(store)
    (folder / name).chmod(0o755 if name == "." else 0o644)
    if name == MEMORY:
        from vmkit.snapshots.store import open_own  # noqa: PLC0415 - as the monitor opens it

        with pytest.raises(DamagedError, match="yours alone"):
            open_own(folder, MEMORY)
        return
    with pytest.raises(DamagedError, match="yours alone"):
        check_state(read_snapshot(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(store: Store) -> None:
    folder = make(store)
    os.chown(folder, 12345, 12345)
    with pytest.raises(DamagedError, match="yours alone"):
        read_snapshot(folder)


def test_link_in_place_of_a_file_is_refused(store: Store, tmp_path: Path) -> None:
    folder = make(store)
    (folder / STATE).rename(tmp_path / "state")
    (folder / STATE).symlink_to(tmp_path / "state")
    with pytest.raises(OSError):
        check_state(read_snapshot(folder))


def test_snapshots_are_picked_by_name_or_first_digits(store: Store) -> None:
    assert store.read_all() == []
    made = make(store)
    named = make_snapshot(store.find_named("mine"), {})
    assert store.pick(made.name[:4]) == store.pick(made.name) == made
    assert store.pick("mine") == named
    assert [one.name for one in store.read_all()] == ["mine", made.name[:12]]
    for word in ("min", "zz", ""):
        if word == "":
            continue
        with pytest.raises(ConfigError, match="no snapshot"):
            store.pick(word)
    make(store, 2)
    with pytest.raises(ConfigError, match="several snapshots"):
        store.pick("")


def test_prune_removes_the_oldest_and_never_those_with_names(store: Store) -> None:
    folders = [make(store, number) for number in range(4)]
    named = make_snapshot(store.find_named("mine"), {})
    for age, folder in enumerate(folders):
        os.utime(folder, (1e9 - age, 1e9 - age))
    size = read_snapshot(folders[0]).record.file_bytes
    assert store.prune(max_bytes=2 * size, idle_s=1e12) == [folders[2].name, folders[3].name]
    assert store.prune(max_bytes=2 * size, idle_s=1e12) == []
    assert store.prune(idle_s=1.0, keep=folders[1].name) == [folders[0].name]
    assert [path for path in (*folders, named) if path.exists()] == [folders[1], named]
    (folders[1] / RECORD).write_bytes(b"")
    (store.folder / "made" / ".half").mkdir()
    assert store.prune() == [folders[1].name]
    assert list((store.folder / "made").iterdir()) == []
    assert named.exists()
