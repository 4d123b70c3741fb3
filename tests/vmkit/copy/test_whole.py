"""Small files go in one message each where the guest's vshd takes them so, and the copy is the same."""

import os
import sys
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Cp, Peers, show
from tests.vmkit.copy.test_copy import make_tree
from tests.vmkit.copy.test_lies import tell
from vmkit.copy import guest_source
from vmkit.copy.copying import CopyError, copy
from vmkit.copy.endpoints import plan_copy
from vmkit.copy.tree import Tally
from vmkit.copy.wire import WHOLE_BYTES_MAX, SftpError

SERVER = Path(__file__).resolve().parents[2] / "fakes" / "vshd_sftp.py"


@pytest.fixture
def vshd(peers: Peers) -> Peers:
    """The guest's server is vshd's."""
    peers.argv = [sys.executable, "-S", str(SERVER)]
    return peers


def test_tree_is_the_same_after_both_ways(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    tree = make_tree(host)
    for size in (WHOLE_BYTES_MAX - 1, WHOLE_BYTES_MAX, WHOLE_BYTES_MAX + 1):
        (tree / f"{size}").write_bytes(os.urandom(size))
    before = show(tree)
    cp("tree", "m:")
    assert show(guest / "tree") == before
    assert (cp("m:tree", "back").files, show(host / "back")) == (9, before)
    cp("m:tree", "n:again")
    assert show(guest / "again") == before


@pytest.mark.parametrize("limit", [1, 100_000, 1 << 30])
def test_data_that_comes_with_names_is_limited(
    cp: Cp, host: Path, guest: Path, vshd: Peers, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Above the limit a listing has names alone, and each file is asked for."""
    monkeypatch.setattr(guest_source, "AHEAD_BYTES_MAX", limit)
    (guest / "tree").mkdir()
    for number in range(60):
        (guest / "tree" / f"{number}").write_bytes(os.urandom(10_000 + number))
    assert cp("m:tree", ".").files == 60
    assert show(host / "tree") == show(guest / "tree")


@pytest.mark.parametrize("words", [("f", "m:"), ("m:f", "n:g")])
def test_copy_counts_what_went_whole(vshd: Peers, host: Path, guest: Path, words: tuple[str, str]) -> None:
    for folder in (host, guest):
        (folder / "f").write_text("data")
    sources, destination = plan_copy(words)
    assert copy(sources, destination, vshd.connect).whole == 1


def test_zeros_become_a_hole(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    (host / "zeros").write_bytes(bytes(WHOLE_BYTES_MAX))
    cp("zeros", "m:")
    assert (guest / "zeros").read_bytes() == bytes(WHOLE_BYTES_MAX)
    assert (guest / "zeros").stat().st_blocks == 0


def test_files_of_proc_and_sys_have_their_data(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    cp("m:/proc/version", "m:/sys/kernel/mm/transparent_hugepage/enabled", ".")
    assert (host / "version").read_bytes() == Path("/proc/version").read_bytes()
    assert b"never" in (host / "enabled").read_bytes()
    cp("/proc/version", "m:")
    assert (guest / "version").read_bytes() == Path("/proc/version").read_bytes()


def test_failed_file_leaves_the_old_one(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    (host / "f").write_text("new")
    (guest / "f").mkdir()
    with pytest.raises(CopyError, match="f: Is a directory"):
        cp("f", "m:f", into=False)
    assert list(guest.iterdir()) == [guest / "f"]
    with pytest.raises(CopyError, match="gone: No such file or directory"):
        cp("m:gone", ".")


@pytest.mark.parametrize("word", ["whole-size", "whole-mode", "whole-status"])
def test_answer_that_does_not_fit_is_asked_for_anew(peers: Peers, cp: Cp, host: Path, word: str) -> None:
    """A guest cannot have a file written that is not what it says: its size, or its kind, is another."""
    tell(peers, word)
    cp("m:t/f", ".")
    assert (host / "f").read_bytes() == b"good data"


@pytest.mark.parametrize("word", ["whole-cut", "whole-length"])
def test_answer_that_is_cut_ends_the_copy(peers: Peers, cp: Cp, host: Path, word: str) -> None:
    tell(peers, word)
    with pytest.raises(SftpError, match="too short"):
        cp("m:t/f", ".")
    assert list(host.iterdir()) == []


def test_progress_counts_whole_files(vshd: Peers, host: Path, guest: Path) -> None:
    (guest / "f").write_text("data")
    seen: list[int] = []
    sources, destination = plan_copy(["m:f", "m:g"])
    copy(sources, destination, vshd.connect, show=lambda tally: seen.append(tally.bytes))
    assert seen[-1] == 4
    assert isinstance(Tally().whole, int)
