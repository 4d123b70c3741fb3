"""A sync makes one directory equal to another, both ways and from guest to guest, and does no more than it must."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vmkit.copy.conftest import Peers, find_temporary, show
from tests.vmkit.copy.test_copy import OLD_S, make_tree
from vmkit.copy.endpoints import plan_sync
from vmkit.copy.excludes import Excludes, read_patterns
from vmkit.copy.sync_tree import Rules, SyncTally
from vmkit.copy.syncing import Synced, SyncError, sync
from vmkit.errors import ConfigError, HostError, MachineError

Sync = Callable[..., tuple[Synced, list[str]]]
WAYS = [("host", "guest"), ("guest", "host"), ("guest", "other")]


@pytest.fixture
def run(peers: Peers, host: Path, guest: Path) -> Iterator[Sync]:
    """run("src", "m:dst") as the command line; also returns what it told. No temporary file and descriptor is left."""

    def call(*words: str, exclude: list[str] | None = None, **rules: bool) -> tuple[Synced, list[str]]:
        tally, told = SyncTally(), list[str]()
        tally.tell = lambda action, path: told.append(f"{action} {os.fsdecode(path)}")
        excludes = None if exclude is None else Excludes(exclude)
        with nothing_left_open():
            done = sync(*plan_sync(words), peers.connect, rules=Rules(**rules, excludes=excludes), tally=tally)
        return done, sorted(told)

    yield call
    assert find_temporary(host) + find_temporary(guest) == []


@pytest.fixture(params=WAYS, ids="-to-".join)
def sides(request: pytest.FixtureRequest, host: Path, guest: Path) -> tuple[Path, Path, str, str]:
    """The directories `src` and `dst`, which are not there yet, and their words."""
    places = {"host": (host, ""), "guest": (guest, "m:"), "other": (guest, "n:")}
    (source, before), (sink, mark) = (places[one] for one in request.param)
    return source / "src", sink / "dst", f"{before}src", f"{mark}dst"


def test_sync_makes_a_tree_equal_and_then_has_nothing_to_do(run: Sync, sides: tuple[Path, Path, str, str]) -> None:
    source, sink, *words = sides
    source.parent.mkdir(exist_ok=True)
    make_tree(source.parent).rename(source)
    done, _ = run(*words)
    assert show(sink) == show(source)
    assert sink.stat().st_mode == source.stat().st_mode
    assert (done.files, done.links, done.deleted) == (6, 3, 0)
    done, told = run(*words, delete=True)
    assert told == []
    assert (done.files, done.bytes, done.unchanged) == (0, 0, 9)
    done, told = run(*words, delete=True, checksum=True)
    assert (told, done.unchanged) == ([], 9)


def test_sync_transfers_what_differs(run: Sync, sides: tuple[Path, Path, str, str]) -> None:
    source, sink, *words = sides
    fill(source, {"same": "same", "size": "longer", "time": "time", "mode": "mode", "new/deep": "new"})
    shutil.copytree(source, sink)
    shutil.rmtree(sink / "new")
    (sink / "size").write_text("short")
    os.utime(sink / "time", (OLD_S, OLD_S))
    (sink / "mode").chmod(0o640)
    (sink / "extra").write_text("extra")
    for folder in (source, sink):
        (folder / "link").symlink_to(folder.name)
    before = show(sink)
    wanted = ["change mode", "copy new/deep", "copy size", "copy time", "link link", "make new/"]
    _, told = run(*words, dry_run=True)
    assert told == wanted
    assert show(sink) == before
    inode = (sink / "same").stat().st_ino
    done, told = run(*words)
    assert told == wanted
    assert (done.files, done.directories, done.links, done.changed, done.unchanged) == (3, 1, 1, 1, 1)
    assert (sink / "extra").read_text() == "extra"
    assert (sink / "same").stat().st_ino == inode
    (sink / "extra").unlink()
    assert show(sink) == show(source)


def test_checksum_finds_data_that_differs_under_the_same_time(run: Sync, sides: tuple[Path, Path, str, str]) -> None:
    source, sink, *words = sides
    fill(source, {"file": "one" * 200_000, "touched": "same", "holes": ""})
    os.truncate(source / "holes", 3_000_000)
    shutil.copytree(source, sink)
    (sink / "holes").write_bytes(bytes(3_000_000))
    shutil.copystat(source / "holes", sink / "holes")
    (sink / "file").write_text("one" * 199_999 + "two")
    shutil.copystat(source / "file", sink / "file")
    os.utime(sink / "touched", (OLD_S, OLD_S))
    assert run(*words)[1] == ["copy touched"]
    os.utime(sink / "touched", (OLD_S, OLD_S))
    done, told = run(*words, checksum=True)
    assert told == ["change touched", "copy file"]
    assert (done.files, done.bytes, done.changed) == (1, 600_000, 1)
    assert show(sink) == show(source)


def test_delete_removes_what_the_source_does_not_have(run: Sync, sides: tuple[Path, Path, str, str]) -> None:
    source, sink, *words = sides
    outside = sink.parent / "outside"
    fill(outside, {"kept": "kept"})
    fill(source, {"a": "a", "file": "now a file", "folder/b": "now a directory", "linked/c": "was a link"})
    fill(sink, {"a": "a", "old/deep/er": "old", "file/x": "x", "folder": "was a file"})
    (sink / "linked").symlink_to(outside)
    (sink / "gone").symlink_to(outside)
    with pytest.raises(SyncError) as caught:
        run(*words)
    assert caught.value.failed == 3
    assert "which --delete replaces" in caught.value.details
    _, told = run(*words, delete=True, dry_run=True)
    assert (sink / "old/deep/er").exists()
    done, really = run(*words, delete=True)
    assert really == told
    assert "delete old/deep/er" in told
    assert "delete old/" in told
    assert done.deleted == 8
    assert show(sink) == show(source)
    assert (outside / "kept").read_text() == "kept"


def test_excluded_files_are_neither_copied_nor_deleted(run: Sync, sides: tuple[Path, Path, str, str]) -> None:
    source, sink, *words = sides
    fill(source, {"a": "a", "a.o": "o", "keep.o": "k", "build/x": "x", "sub/top": "t", "top": "t"})
    fill(sink, {"b.o": "stays", "build/y": "stays", "old/c.o": "stays", "old/c": "goes", "gone/d": "goes"})
    run(*words, delete=True, exclude=["*.o", "!keep.o", "build/", "/top"])
    left = sorted(str(path.relative_to(sink)) for path in sink.rglob("*") if path.is_file())
    assert left == ["a", "b.o", "build/y", "keep.o", "old/c.o", "sub/top"]


def test_patterns_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"# a comment\r\n*.o\r\n\r\n!keep.o\n")
    excludes = Excludes(read_patterns(str(tmp_path / "list")))
    assert excludes.has(b"a/b.o", is_folder=False)
    assert not excludes.has(b"a/keep.o", is_folder=False)
    assert not Excludes(["b"]).has(b"b\n", is_folder=False)
    assert Excludes(["b*"]).has(b"a/b\xff\n", is_folder=False)
    with pytest.raises(ConfigError, match="is not valid"):
        Excludes(["!"])
    with pytest.raises(ConfigError, match="No such file"):
        read_patterns(str(tmp_path / "none"))


def test_patterns_without_their_library_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pathspec", None)
    with pytest.raises(HostError, match="need the Python package pathspec"):
        Excludes(["*.o"])


def test_directory_that_cannot_be_listed_deletes_nothing(
    run: Sync, host: Path, guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(host / "src", {"a": "a"})
    fill(guest / "dst", {"a": "b", "b": "b"})
    listdir = os.listdir

    def fail(path: int | str) -> list[str]:
        if isinstance(path, int) and Path(f"/proc/self/fd/{path}").readlink() == host / "src":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(MachineError, match="cannot sync src: Permission denied"):
        run("src", "m:dst", delete=True)
    assert (guest / "dst/b").exists()


def test_existing_destination_keeps_its_own_mode(run: Sync, host: Path, guest: Path) -> None:
    fill(host / "src", {"a": "a"})
    (host / "src").chmod(0o700)
    (guest / "dst").mkdir(mode=0o755)
    run("src/", "m:dst/")
    assert (guest / "dst").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (("file", "m:dst"), ConfigError, "file: it is not a directory"),
        (("m:file", "dst"), ConfigError, "m:file: it is not a directory"),
        (("m:none", "dst"), MachineError, "cannot sync m:none: No such file or directory"),
        (("none", "m:dst"), MachineError, "cannot sync none: No such file or directory"),
        (("src", "m:file"), MachineError, "cannot make m:file"),
        (("m:src", "file"), MachineError, "cannot make file"),
        (("src", "m:no/where"), MachineError, "m:no is not an existing directory"),
        (("m:src", "m:src"), ConfigError, "the same directory"),
        (("m:src", "m:again"), ConfigError, "the same directory"),
        (("m:src", "m:src/new"), ConfigError, "the destination is inside the source"),
        (("m:src/a", "m:src"), ConfigError, "the source is inside the destination"),
        (("src", "dst"), ConfigError, "neither src nor dst is on a machine"),
        (("-", "m:dst"), ConfigError, "no directory"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_sync_that_is_none_is_refused(
    run: Sync, host: Path, guest: Path, words: tuple[str, str], kind: type[Exception], text: str, dry_run: bool
) -> None:
    for folder in (host, guest):
        fill(folder, {"file": "file", "src/a/b": "b"})
    (guest / "again").symlink_to("src")
    before = show(host), show(guest)
    with pytest.raises(kind, match=text):
        run(*words, delete=True, dry_run=dry_run)
    assert (show(host), show(guest)) == before


def fill(folder: Path, files: dict[str, str]) -> None:
    """Makes files with an old time, by their paths."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (OLD_S, OLD_S + len(text)))
