"""Crashes on disk: they appear whole and in order, are the user's alone, have limits, and survive what damages them."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from vmkit.crashes import store
from vmkit.crashes.place import find_crashes_folder, find_usable_folder
from vmkit.crashes.record import (
    Crash,
    CrashKind,
    DumpFormat,
    FailedService,
    Program,
    ServiceEnd,
    parse_crash,
    render_crash,
)
from vmkit.crashes.store import DMESG, DUMP, RECORD, bound, list_all, list_of, make_crash, pick, remove
from vmkit.errors import ConfigError

CRASH = Crash(CrashKind.PANIC, 1000.5, "the guest's kernel panicked: a reason", "tiny", "0" * 64, "6.12.0")


def keep(root: Path, machine: str = "m", crash: Crash = CRASH, dump_bytes: int = 0) -> Path:
    new = make_crash(root, machine)
    (new.folder / DMESG).write_bytes(b"<6>[    0.000000] Linux version 6.12.0\n")
    if dump_bytes:
        (new.folder / DUMP).write_bytes(b"x" * dump_bytes)
    folder = new.publish(crash)
    new.close()
    return folder


def test_crashes_are_numbered_and_listed_by_machine(tmp_path: Path) -> None:
    root = tmp_path / "crashes"
    assert list_all(root) == []
    keep(root, "web", replace(CRASH, at_s=3.0))
    keep(root, "db", replace(CRASH, at_s=2.0))
    keep(root, "web", replace(CRASH, at_s=1.0))
    assert [(kept.machine, kept.number) for kept in list_all(root)] == [("db", 1), ("web", 1), ("web", 2)]
    assert [kept.number for kept in list_of(root, "web")] == [1, 2]
    assert pick(root, "web", None).number == 2
    assert pick(root, "web", 1).crash == replace(CRASH, at_s=3.0)
    with pytest.raises(ConfigError, match="'web' has no crash 7"):
        pick(root, "web", 7)
    with pytest.raises(ConfigError, match="no crash of 'other' is kept"):
        pick(root, "other", None)


def test_number_of_a_removed_crash_is_not_used_while_newer_ones_are_there(tmp_path: Path) -> None:
    keep(tmp_path)
    keep(tmp_path)
    remove(pick(tmp_path, "m", 1))
    keep(tmp_path)
    assert [kept.number for kept in list_of(tmp_path, "m")] == [2, 3]
    remove(pick(tmp_path, "m", 2))
    remove(pick(tmp_path, "m", 3))
    # The last one takes the machine's folder along.
    assert list(tmp_path.iterdir()) == []


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = keep(tmp_path / "a" / "crashes")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / RECORD).stat().st_mode) == 0o600


def test_unpublished_crash_is_invisible_and_leaves_nothing(tmp_path: Path) -> None:
    new = make_crash(tmp_path, "m")
    (new.folder / DUMP).write_bytes(b"half")
    assert list_all(tmp_path) == []
    new.close()
    new.close()
    assert list((tmp_path / "m").iterdir()) == []


def test_what_a_killed_program_left_is_swept_and_what_lives_stays(tmp_path: Path) -> None:
    living = make_crash(tmp_path, "m")
    # Also of a machine whose name is never used again.
    lefts = [tmp_path / machine / ".new.1.1" for machine in ("m", "once")]
    for left in lefts:
        left.mkdir(parents=True)
        (left / DUMP).write_bytes(b"half")
    (tmp_path / "a file").write_text("")
    keep(tmp_path)
    assert not any(left.exists() for left in lefts)
    assert living.folder.exists()
    living.close()


def test_two_programs_that_publish_at_once_get_numbers_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_crash(tmp_path, "m"), make_crash(tmp_path, "m")
    one.publish(CRASH)
    # It has looked before the first one was there.
    looks = iter([[], [1]])
    monkeypatch.setattr(store, "_list_numbers", lambda _folder: next(looks))
    assert other.publish(CRASH).name == "2"
    one.close()
    other.close()


def test_oldest_crashes_of_a_machine_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_CRASHES", 3)
    keep(tmp_path, "other", replace(CRASH, at_s=0.0))
    for _ in range(5):
        keep(tmp_path)
        bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [3, 4, 5]
    # It is older than all of them, and another machine's.
    assert len(list_of(tmp_path, "other")) == 1


def test_crashes_of_programs_leave_the_panics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_CORES", 2)
    program = Program(1, 2, 3, 4, "n", (), "", "", is_contained=False, is_whole=True)
    keep(tmp_path)
    for _ in range(5):
        keep(tmp_path, crash=replace(CRASH, kind=CrashKind.CORE, program=program))
        bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [1, 5, 6]


def test_user_who_crashes_without_end_loses_the_oldest_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_CORES", 3)
    program = Program(1, 0, 0, 4, "n", (), "", "", is_contained=False, is_whole=True)
    for uid in (0, 1001, 1000, 1000, 1000, 1000):
        keep(tmp_path, crash=replace(CRASH, kind=CrashKind.CORE, program=replace(program, uid=uid)))
        bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [1, 2, 6]
    # And root takes no room of the others'.
    for _ in range(3):
        keep(tmp_path, crash=replace(CRASH, kind=CrashKind.CORE, program=program))
        bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [2, 6, 9]


def test_service_that_fails_without_end_loses_its_oldest_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_CORES", 3)
    program = Program(1, 0, 0, 4, "n", (), "", "", is_contained=False, is_whole=True)
    keep(tmp_path, crash=replace(CRASH, kind=CrashKind.CORE, program=program))
    for unit in ("db", "web", "web", "web", "web"):
        service = FailedService(unit, "timeout", ServiceEnd.UNKNOWN, 0, 0, "", 0, 0, is_restarted=False)
        keep(tmp_path, crash=replace(CRASH, kind=CrashKind.SERVICE, service=service))
        bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [1, 2, 6]


def test_large_crashes_make_room_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MACHINE_BYTES", 100_000)
    keep(tmp_path, dump_bytes=10)
    keep(tmp_path, dump_bytes=90_000)
    bound(tmp_path, "m")
    assert len(list_of(tmp_path, "m")) == 2 or [kept.number for kept in list_of(tmp_path, "m")] == [2]
    keep(tmp_path, dump_bytes=300_000)
    bound(tmp_path, "m")
    assert [kept.number for kept in list_of(tmp_path, "m")] == [3]


def test_all_machines_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_ALL", 2)
    for number, name in enumerate(("a", "b", "c")):
        keep(tmp_path, name, replace(CRASH, at_s=float(number)))
        bound(tmp_path, name)
    assert [kept.machine for kept in list_all(tmp_path)] == ["b", "c"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', "[" * 100_000, "null"])
def test_damaged_record_is_listed_and_can_be_removed(tmp_path: Path, text: str) -> None:
    (keep(tmp_path) / RECORD).write_text(text)
    (kept,) = list_all(tmp_path)
    assert kept.crash is None
    assert kept.damage
    remove(kept)
    assert list_all(tmp_path) == []


def test_folders_of_others_are_no_crashes(tmp_path: Path) -> None:
    keep(tmp_path)
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "12345678901").mkdir()
    (tmp_path / "file").write_text("")
    assert [kept.number for kept in list_all(tmp_path)] == [1]


def test_record_is_the_same_after_its_json() -> None:
    program = Program(1, 2, 3, 4, "n", ("a", "b"), "/e\udcff", "0::/", is_contained=True, is_whole=False)
    crash = replace(
        CRASH, dump=DumpFormat.KDUMP, dump_bytes=5, trouble="none", vmlinux="/v", program=program, root="/r"
    )
    assert parse_crash(json.loads(json.dumps(render_crash(crash)))) == crash
    for key in render_crash(crash):
        broken = {**render_crash(crash), key: ["of another kind"]}
        with pytest.raises(ValueError):
            parse_crash(broken)


def test_long_text_of_a_guest_is_cut() -> None:
    assert len(json.dumps(render_crash(replace(CRASH, brief="x" * 1_000_000)))) < 10_000


def test_folder_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_DATA_DIR", str(data))
    assert find_usable_folder() == find_crashes_folder() == data / "crashes"
    data.chmod(0o777)
    assert find_usable_folder() is None
