"""A guest that lies gets an error, and writes nothing outside the destination and nothing that is not whole."""

import sys
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Cp, Peers
from vmkit.copy import guest_source
from vmkit.copy.copying import CopyError
from vmkit.copy.wire import SftpError
from vmkit.errors import MachineError, VmkitError

SERVER = Path(__file__).resolve().parents[2] / "fakes" / "lying_sftp.py"


@pytest.fixture
def lie(peers: Peers) -> Peers:
    """lie.argv is set by each test."""
    return peers


def tell(peers: Peers, word: str) -> None:
    peers.argv = [sys.executable, "-I", "-S", str(SERVER), word]


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_same_server_without_a_lie_is_copied(cp: Cp, host: Path, lie: Peers) -> None:
    tell(lie, "none")
    cp("m:t", ".")
    assert (host / "t" / "f").read_bytes() == b"good data"


@pytest.mark.parametrize(
    ("word", "brief"),
    [
        ("slash", "a name that no file can have: b'../evil'"),
        ("inner-slash", "a name that no file can have"),
        ("nul", "a name that no file can have"),
        ("empty", "a name that no file can have"),
        ("long", "a name that no file can have"),
        ("twice", "a listing of m:t without an end"),
        ("no-names", "a listing without names"),
        ("count", "a list of 1073741824 items"),
        ("huge", "a size of 18446744073709551615 bytes"),
        ("handle", "a handle of 300 bytes"),
        ("no-handle", "answered OPENDIR with success and no answer"),
        ("wrong-id", "answered request 12345"),
        ("two-replies", "which was not sent or has its answer"),
        ("wrong-type", "answered READ with ATTRS"),
        ("no-reply-type", "a packet of type 77"),
        ("overflow", "for a read of 32768 bytes"),
        ("no-data", "0 bytes for a read"),
        ("oversized", "a packet of 1073741824 bytes"),
        ("cut", "too short"),
        ("link", "answered READLINK without one path"),
        ("version", "has version 6"),
        ("folder-slash", "a name that no file can have: b'../evil'"),
        ("folder-size", "9 bytes for a file of 1099511627776 bytes"),
        ("folder-link", "9 bytes for a file of 9 bytes, which is a symbolic link"),
        ("folder-large", "50000 bytes for a file of 50000 bytes"),
        ("folder-count", "a list of 1073741824 items"),
        ("folder-twice", "a listing of m:t without an end"),
        ("folder-none", "a listing without names"),
        ("folder-endless", "a listing of m:t without an end"),
        ("folder-status", "answered READDIR with success and no names"),
    ],
)
def test_lie_ends_the_copy(cp: Cp, host: Path, lie: Peers, word: str, brief: str) -> None:
    tell(lie, word)
    (host / "t").mkdir()
    (host / "t" / "f").write_text("old")
    with pytest.raises(SftpError, match=brief):
        cp("m:t", ".")
    # The tree of a lie is not copied in part, but what was whole before the lie may be there.
    assert names_below(host) <= {"t", "t/f", "t/l"}
    assert (host / "t" / "f").read_bytes() in (b"old", b"good data")
    assert names_below(host.parent) == {"host", "guest"} | {f"host/{name}" for name in names_below(host)}


@pytest.mark.parametrize("word", ["shrinks", "grows"])
def test_size_that_changes_is_an_error(cp: Cp, host: Path, lie: Peers, word: str) -> None:
    tell(lie, word)
    (host / "f").write_text("old")
    with pytest.raises(CopyError, match="cannot copy m:t/f: it changed while vmkit read it"):
        cp("m:t/f", ".")
    assert (host / "f").read_text() == "old"


def test_listing_without_an_end_ends(cp: Cp, host: Path, lie: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(lie, "endless")
    monkeypatch.setattr(guest_source, "NAMES_MAX", 5000)
    with pytest.raises(VmkitError, match=r"without an end|READLINK"):
        cp("m:t", ".")


def test_tree_without_an_end_ends(cp: Cp, host: Path, lie: Peers) -> None:
    tell(lie, "nested")
    with pytest.raises(CopyError, match="nested more than 250 deep"):
        cp("m:t", ".")


def test_server_that_ends_is_an_error(cp: Cp, host: Path, lie: Peers) -> None:
    tell(lie, "exit")
    (host / "f").write_text("old")
    with pytest.raises(MachineError, match="the connection to 'm' ended before the copy did"):
        cp("m:t/f", ".")
    assert (host / "f").read_text() == "old"


def test_server_that_is_silent_is_an_error(cp: Cp, lie: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(lie, "silence")
    monkeypatch.setattr("vmkit.copy.sides.SILENCE_S", 0.2)
    with pytest.raises(MachineError, match=r"'m' did not answer for 0\.2 s"):
        cp("m:t/f", ".")


def test_link_that_a_guest_sent_before_leads_nowhere(cp: Cp, host: Path, guest: Path) -> None:
    """The first copy brings a link to a directory outside; the second one sends a directory of its name."""
    outside = host.parent / "outside"
    outside.mkdir()
    (guest / "t").mkdir()
    (guest / "t" / "d").symlink_to(outside)
    cp("m:t", ".")
    (guest / "t" / "d").unlink()
    (guest / "t" / "d").mkdir()
    (guest / "t" / "d" / "evil").write_text("evil")
    with pytest.raises(CopyError, match="a link that is not a directory has this name"):
        cp("m:t", ".")
    assert list(outside.iterdir()) == []
