"""Entries: whole from the moment they are seen, kept as long as their lock is held, and swept when it is free."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmkit.entries.entry import NEW_PREFIX, OLD_PREFIX, discard, make_entry, read_entries, sweep_all, write_record
from vmkit.entries.folder import hold_registry
from vmkit.errors import HostError
from vsh.registry import LOCK, MAX_RECORD_BYTES, is_held


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_entry_is_seen_when_it_is_published_and_held_until_the_block_ends(tmp_path: Path) -> None:
    with make_entry(tmp_path, "one") as entry:
        write_record(entry.directory / "record.json", {"name": "one"})
        assert names(tmp_path) == [".new.one"]
        entry.publish("one")
        assert names(tmp_path) == ["one"]
        assert json.loads((tmp_path / "one" / "record.json").read_text()) == {"name": "one"}
        assert is_held(tmp_path / "one" / LOCK)
    assert not is_held(tmp_path / "one" / LOCK)


def test_entry_in_the_way_keeps_its_name(tmp_path: Path) -> None:
    with make_entry(tmp_path, "a") as first, make_entry(tmp_path, "b") as second:
        first.publish("1")
        with pytest.raises(OSError, match="not empty"):
            second.publish("1")
        second.publish("2")
        assert names(tmp_path) == ["1", "2"]


def test_sweep_leaves_what_is_held_also_before_it_is_published(tmp_path: Path) -> None:
    with make_entry(tmp_path, "hidden"), make_entry(tmp_path, "shown") as shown:
        shown.publish("shown")
        sweep_all(tmp_path)
        assert names(tmp_path) == [".new.hidden", "shown"]
    sweep_all(tmp_path)
    assert names(tmp_path) == []


def test_sweep_removes_what_killed_programs_left_and_no_folder_of_others(tmp_path: Path) -> None:
    for name in (f"{NEW_PREFIX}without-a-lock", f"{OLD_PREFIX}gone.7", "a folder of mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    sweep_all(tmp_path)
    assert names(tmp_path) == ["a folder of mine"]


def test_reader_at_the_moment_of_a_sweep_is_no_owner(tmp_path: Path) -> None:
    with make_entry(tmp_path, "one") as entry:
        entry.publish("one")
    with (tmp_path / "one" / LOCK).open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        sweep_all(tmp_path)
    assert names(tmp_path) == []


def test_sweep_keeps_an_entry_whose_lock_it_cannot_look_at(tmp_path: Path) -> None:
    hidden = tmp_path / f"{NEW_PREFIX}hidden"
    hidden.mkdir()
    (hidden / LOCK).symlink_to(LOCK)
    sweep_all(tmp_path)
    assert names(tmp_path) == [hidden.name]


def test_entry_that_gets_no_lock_leaves_nothing(tmp_path: Path) -> None:
    """A process without a free descriptor makes the directory, and then no file in it."""
    script = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from vmkit.entries.entry import make_entry\n"
        "free = os.dup(0)\n"
        "os.close(free)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))\n"
        "try:\n"
        "    with make_entry(Path(sys.argv[1]), 'one'): pass\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == os.strerror(errno.EMFILE)
    assert names(tmp_path) == []


def test_discard_removes_the_name_and_what_was_in_it(tmp_path: Path) -> None:
    with make_entry(tmp_path, "one") as entry:
        entry.publish("one")
        (tmp_path / "one" / "folder").mkdir()
        discard(entry.directory)
        assert names(tmp_path) == []


def test_registry_that_cannot_be_locked_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot write to the runtime directory"), hold_registry(tmp_path / "missing"):
        pass


def test_entries_that_live_and_are_what_they_say_are_read(tmp_path: Path) -> None:
    """Not one whose owner is gone, one that was copied, and one whose record is another thing or has no end."""
    texts = {
        "b": '{"name": "b"}',
        "a": '{"name": "a"}',
        "copied": '{"name": "a"}',
        "wrong": "[]",
        "deep": "[" * 100_000,
        "long": '{"name": "long", "fill": "' + "x" * MAX_RECORD_BYTES + '"}',
        "gone": '{"name": "gone"}',
    }
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            entry = stack.enter_context(make_entry(tmp_path, name))
            (entry.directory / "record.json").write_text(text)
            entry.publish(name)
        fcntl.flock(entry.lock_fd, fcntl.LOCK_UN)
        stack.enter_context(make_entry(tmp_path, "unpublished"))
        found = read_entries(tmp_path, "record.json", lambda record, directory: (record["name"], directory))
    assert [directory.name for directory in found] == ["a", "b"]
    assert read_entries(tmp_path / "missing", "record.json", lambda record, _: ("", record)) == []
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot read"):
        read_entries(tmp_path / "file", "record.json", lambda record, _: ("", record))
