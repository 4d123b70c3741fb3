"""Files and directories go both ways, and from guest to guest, with all that a copy keeps."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Cp, Peers, show
from vmkit.copy.copying import Copied, CopyError, copy
from vmkit.copy.endpoints import plan_copy
from vmkit.copy.items import Keep
from vmkit.copy.tree import Tally
from vmkit.copy.wire import CHUNK_BYTES_MAX
from vmkit.errors import ConfigError, MachineError

OLD_S = 1_000_000_000
TIB = 1 << 40


def make_tree(folder: Path) -> Path:
    """A tree with what a copy must keep."""
    tree = folder / "tree"
    inner = tree / "inner" / "deep"
    inner.mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "secret").write_bytes(b"s")
    (tree / "secret").chmod(0o400)
    (tree / "none").write_bytes(b"")
    (inner / "big").write_bytes(random.Random(1).randbytes(3 * CHUNK_BYTES_MAX))
    (inner / "odd").write_bytes(random.Random(2).randbytes(CHUNK_BYTES_MAX + 17))
    Path(os.fsdecode(os.fsencode(tree) + b"/bad \xff\nname")).write_bytes(b"odd name")
    (tree / "loop").symlink_to("loop")
    (tree / "absolute").symlink_to("/etc/passwd")
    (tree / "up").symlink_to("inner")
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (OLD_S + 1, OLD_S), follow_symlinks=False)
    inner.chmod(0o500)
    return tree


def test_tree_is_the_same_after_both_ways(cp: Cp, host: Path, guest: Path) -> None:
    tree = make_tree(host)
    before = show(tree)
    copied = cp("tree", "m:")
    assert show(guest / "tree") == before
    assert (copied.files, copied.directories, copied.links) == (6, 4, 3)
    assert copied.bytes == sum(len(row[3]) for row in before.values() if row[0] == "file" and isinstance(row[3], bytes))
    assert int((guest / "tree").stat().st_mtime) == OLD_S
    cp("m:tree", "back")
    assert show(host / "back") == before


def test_tree_goes_from_guest_to_guest(cp: Cp, host: Path, guest: Path) -> None:
    make_tree(guest)
    cp("one:tree", "other:copy")
    assert show(guest / "copy") == show(guest / "tree")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES_MAX - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, 20_000_001])
def test_file_of_any_size(cp: Cp, host: Path, guest: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (host / "file").write_bytes(data)
    assert cp("file", "m:there").bytes == size
    assert (guest / "there").read_bytes() == data
    cp("m:there", "back")
    assert (host / "back").read_bytes() == data
    cp("m:there", "n:again")
    assert (guest / "again").read_bytes() == data


def test_existing_directory_takes_copies_under_their_names(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "in").mkdir()
    for name in ("a", "b"):
        (host / name).write_text(name)
    cp("a", "b", "m:in")
    assert {path.name for path in (guest / "in").iterdir()} == {"a", "b"}
    (host / "out").mkdir()
    cp("m:in/a", "n:in/b", "out/")
    assert {path.name for path in (host / "out").iterdir()} == {"a", "b"}


def test_dot_copies_what_a_directory_contains(cp: Cp, host: Path, guest: Path) -> None:
    (host / "d").mkdir()
    (host / "d" / "x").write_text("x")
    (guest / "to").mkdir()
    cp("d/.", "m:to")
    assert (guest / "to" / "x").read_text() == "x"
    cp("m:", "whole")
    assert (host / "whole" / "to" / "x").read_text() == "x"


def test_copy_into_a_directory_that_is_there_adds_to_it(cp: Cp, host: Path, guest: Path) -> None:
    make_tree(host)
    (guest / "tree").mkdir(mode=0o711)
    (guest / "tree" / "kept").write_text("kept")
    (guest / "tree" / "script").write_text("old")
    cp("tree", "m:")
    assert (guest / "tree" / "kept").read_text() == "kept"
    assert (guest / "tree" / "script").read_text() == "#!/bin/sh\n"
    # A directory that was there keeps its own mode.
    assert (guest / "tree").stat().st_mode & 0o777 == 0o711


def test_exact_destination_is_the_copy_itself(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "d").mkdir()
    (guest / "d" / "x").write_text("x")
    (host / "d").mkdir()
    cp("m:d", "d", into=False)
    assert (host / "d" / "x").read_text() == "x"


def test_hard_links_of_the_host_stay_one_file(cp: Cp, host: Path, guest: Path) -> None:
    (host / "t" / "sub").mkdir(parents=True)
    (host / "t" / "a").write_bytes(b"x" * 100_000)
    for number in range(100):
        (host / "t" / "sub" / str(number)).hardlink_to(host / "t" / "a")
    (guest / "t").mkdir()
    (guest / "t" / "a").write_text("old")
    copied = cp("t", "m:")
    assert (guest / "t" / "a").stat().st_nlink == 101
    assert copied.files == 101
    cp("t", "m:")
    assert (guest / "t" / "a").stat().st_nlink == 101


def test_sparse_file_of_a_tebibyte_takes_no_room_in_the_guest(cp: Cp, host: Path, guest: Path) -> None:
    with (host / "disk").open("wb") as file:
        file.truncate(TIB)
        file.seek(TIB // 2)
        file.write(b"middle")
    copied = cp("disk", "m:")
    state = (guest / "disk").stat()
    assert (state.st_size, state.st_blocks < 1000, copied.bytes < 1 << 20) == (TIB, True, True)
    with (guest / "disk").open("rb") as file:
        file.seek(TIB // 2)
        assert file.read(7) == b"middle\0"


def test_zeros_become_holes_on_the_host(cp: Cp, host: Path, guest: Path) -> None:
    data = b"\1" + bytes(8 << 20) + b"\2" * 5000 + bytes(3 << 20)
    (guest / "disk").write_bytes(data)
    cp("m:disk", "disk")
    assert (host / "disk").read_bytes() == data
    assert (host / "disk").stat().st_blocks * 512 < 100_000


def test_file_of_four_gibibytes_and_one_byte(cp: Cp, host: Path, guest: Path) -> None:
    size = (4 << 30) + 1
    with (host / "disk").open("wb") as file:
        file.truncate(size)
        file.seek(size - 1)
        file.write(b"z")
    cp("disk", "m:")
    assert (guest / "disk").stat().st_size == size
    with (guest / "disk").open("rb") as file:
        file.seek(size - 1)
        assert file.read() == b"z"


def test_named_link_is_followed_and_links_below_are_kept(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "real").mkdir()
    (guest / "real" / "x").write_text("x")
    (guest / "link").symlink_to("real")
    (guest / "dangling").symlink_to("nowhere")
    cp("m:link", "m:real/x", "m:dangling", ".")
    assert not (host / "link").is_symlink()
    assert (host / "link" / "x").read_text() == "x"
    assert (host / "dangling").readlink() == Path("nowhere")


def test_old_link_is_replaced_and_its_target_is_not_written(cp: Cp, host: Path, guest: Path) -> None:
    (host / "target").write_text("safe")
    (host / "link").symlink_to("target")
    (guest / "link").write_text("new")
    cp("m:link", "link")
    assert (host / "target").read_text() == "safe"
    assert (host / "link").read_text() == "new"
    (guest / "link").unlink()
    (guest / "link").symlink_to("elsewhere")
    (host / "t").mkdir()
    (host / "t" / "l").symlink_to("/nowhere")
    cp("t/.", "m:")
    assert (guest / "l").readlink() == Path("/nowhere")


def test_files_of_proc_and_sys_have_their_data(cp: Cp, host: Path) -> None:
    cp("m:/proc/self/limits", "m:/sys/kernel/uevent_seqnum", ".")
    assert "Max open files" in (host / "limits").read_text()
    assert (host / "uevent_seqnum").read_text().strip().isdigit()
    cp("/proc/self/limits", "m:from-host")


def test_special_files_are_skipped_and_reported(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "t").mkdir()
    os.mkfifo(guest / "t" / "fifo")
    (guest / "t" / "x").write_text("x")
    copied = cp("m:t", ".")
    assert (copied.files, copied.skipped) == (1, ("m:t/fifo",))
    assert not (host / "t" / "fifo").exists()


def test_set_user_id_of_a_guest_is_dropped(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "su").write_text("x")
    (guest / "su").chmod(0o4755)
    cp("m:su", ".")
    assert (host / "su").stat().st_mode & 0o7777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owners_are_kept_when_asked_for(cp: Cp, host: Path, guest: Path) -> None:
    (host / "f").write_text("x")
    os.chown(host / "f", 1234, 2345)
    cp("f", "m:plain")
    cp("f", "m:kept", keep=Keep(owners=True))
    assert ((guest / "plain").stat().st_uid, (guest / "kept").stat().st_uid) == (0, 1234)
    cp("m:kept", "back", keep=Keep(owners=True, fsync=True))
    assert ((host / "back").stat().st_uid, (host / "back").stat().st_gid) == (1234, 2345)


def test_streams_are_ends_of_a_copy(cp: Cp, host: Path, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(3).randbytes(3_000_001)
    (host / "in").write_bytes(data)
    with (host / "in").open("rb") as source, (host / "out").open("wb") as target:
        monkeypatch.setattr("vmkit.copy.copying.STDIN", source.fileno())
        monkeypatch.setattr("vmkit.copy.copying.STDOUT", target.fileno())
        cp("-", "m:there")
        assert (guest / "there").read_bytes() == data
        cp("m:there", "-")
    assert (host / "out").read_bytes() == data


def test_many_small_files_and_a_deep_tree(cp: Cp, host: Path, guest: Path) -> None:
    for number in range(3000):
        folder = host / "t" / str(number % 30)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_text(str(number))
    deep = host / "t" / "/".join(["d"] * 100)
    deep.mkdir(parents=True)
    (deep / "leaf").write_text("leaf")
    assert cp("t", "m:").files == 3001
    assert show(guest / "t") == show(host / "t")
    assert cp("m:t", "back").files == 3001
    assert show(host / "back") == show(host / "t")


def test_one_large_directory_is_read_in_parts(cp: Cp, host: Path, guest: Path) -> None:
    """More names than wait at once."""
    (guest / "d").mkdir()
    for number in range(10_000):
        (guest / "d" / f"{number}").touch()
    assert cp("m:d", ".").files == 10_000
    assert len(os.listdir(host / "d")) == 10_000


def test_server_without_extensions_serves_too(cp: Cp, host: Path, guest: Path, peers: Peers) -> None:
    peers.argv = [*peers.argv, "-P", "posix-rename,fsync,hardlink,limits,statvfs"]
    (guest / "f").write_text("old")
    (host / "f").write_bytes(b"n" * 100_000)
    (host / "t").mkdir()
    (host / "t" / "a").write_text("a")
    (host / "t" / "b").hardlink_to(host / "t" / "a")
    cp("f", "t", "m:", keep=Keep(fsync=True))
    assert (guest / "f").read_bytes() == b"n" * 100_000
    assert (guest / "t" / "b").read_text() == "a"


def test_progress_knows_the_whole(peers: Peers, host: Path, guest: Path) -> None:
    make_tree(host)
    seen: list[tuple[int, int]] = []

    def record(tally: Tally) -> None:
        seen.append((tally.bytes, tally.found_bytes))

    sources, destination = plan_copy(["tree", "m:"])
    copied = copy(sources, destination, peers.connect, show=record)
    assert isinstance(copied, Copied)
    assert seen == sorted(seen)
    assert seen[-1] == (copied.bytes, copied.bytes)


def test_two_writers_of_one_file_do_not_mix(peers: Peers, host: Path, guest: Path) -> None:
    """Two writers of one file: the file is that of one of them, whole."""
    (host / "a").write_bytes(b"a" * 5_000_000)
    (host / "b").write_bytes(b"b" * 5_000_000)
    code = "import sys; from tests.vmkit.copy.writer import main; main(*sys.argv[1:])"
    root = str(Path(__file__).resolve().parents[3])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(host / name), str(guest)], env={**os.environ, "PYTHONPATH": root}
        )
        for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert (guest / "same").read_bytes() in ((host / "a").read_bytes(), (host / "b").read_bytes())
    assert [path.name for path in guest.iterdir()] == ["same"]


@pytest.mark.parametrize("words", [["m:nothing", "x"], ["nothing", "m:x"]])
def test_missing_source_is_an_error(cp: Cp, host: Path, words: list[str]) -> None:
    with pytest.raises(CopyError, match=r"cannot copy (m:)?nothing: No such file or directory"):
        cp(*words)


def test_missing_directories_are_errors(cp: Cp, host: Path, guest: Path) -> None:
    (host / "f").write_text("x")
    with pytest.raises(MachineError, match="m:no/such is not an existing directory"):
        cp("f", "m:no/such/place")
    with pytest.raises(ConfigError, match="no/ is not an existing directory"):
        cp("f", "m:no/")
    (guest / "f").write_text("x")
    with pytest.raises(MachineError, match="no: No such file"):
        cp("m:f", "no/place")
    with pytest.raises(ConfigError, match="here is not an existing directory"):
        cp("m:f", "m:f", "here")
