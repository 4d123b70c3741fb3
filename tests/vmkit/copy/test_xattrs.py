"""Extended attributes go with files and directories where the user asks for it, and a guest gives this host few."""

import os
import struct
import sys
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Cp, Peers
from tests.vmkit.copy.test_lies import tell
from tests.vmkit.copy.test_sync import sides  # noqa: F401  (a fixture)
from vmkit.copy.copying import CopyError
from vmkit.copy.endpoints import plan_sync
from vmkit.copy.items import Keep
from vmkit.copy.sync_tree import Rules, SyncTally
from vmkit.copy.syncing import sync
from vmkit.copy.wire import XATTR, XATTRS_MAX, Cursor, FileAttributes, pack_attributes
from vmkit.copy.xattrs import choose_for_guest, choose_for_host, find_changes
from vmkit.errors import MachineError

FAKES = Path(__file__).resolve().parents[2] / "fakes"
KEEP = Keep(xattrs=True)
# A file capability: VFS_CAP_REVISION_2, cap_net_raw+ep.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
Pairs = dict[str, bytes]


def read(path: Path) -> Pairs:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def give(path: Path, pairs: Pairs) -> None:
    for name, value in pairs.items():
        os.setxattr(path, name, value)


@pytest.fixture(autouse=True)
def keeps_attributes(tmp_path: Path) -> None:
    """Skips where this host's file system has no extended attributes, as tmpfs before Linux 6.6."""
    try:
        os.setxattr(tmp_path, "user.probe", b"")
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no extended attributes: {error.strerror}")


@pytest.fixture
def vshd(peers: Peers) -> Peers:
    peers.argv = [sys.executable, "-S", str(FAKES / "vshd_sftp.py")]
    return peers


def make_source(folder: Path) -> dict[str, Pairs]:
    """A tree with attributes; what each file of it has."""
    (folder / "inner").mkdir(parents=True)
    (folder / "small").write_text("small")
    (folder / "large").write_bytes(bytes(range(256)) * 4000)
    (folder / "inner" / "read-only").write_text("r")
    (folder / "plain").write_text("plain")
    (folder / "link").symlink_to("small")
    wanted: dict[str, Pairs] = {
        "small": {"user.mime": b"text/plain", "user.empty": b""},
        "large": {"user.bin": bytes(range(256))},
        "inner": {"user.of a folder": b"\0\n"},
        "inner/read-only": {"user.\u00e4": b"x" * 1000},
        "plain": {},
    }
    for name, pairs in wanted.items():
        give(folder / name, pairs)
    (folder / "inner" / "read-only").chmod(0o444)
    return wanted


def show(folder: Path, names: dict[str, Pairs]) -> dict[str, Pairs]:
    return {name: read(folder / name) for name in names}


def test_tree_keeps_attributes_both_ways_and_between_guests(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    wanted = make_source(host / "src")
    cp("src", "m:there", keep=KEEP)
    assert show(guest / "there", wanted) == wanted
    cp("m:there", "back", keep=KEEP)
    assert show(host / "back", wanted) == wanted
    cp("m:there", "n:again", keep=KEEP)
    assert show(guest / "again", wanted) == wanted


def test_copy_without_the_option_keeps_none(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    wanted = make_source(host / "src")
    cp("src", "m:there")
    assert show(guest / "there", wanted) == {name: {} for name in wanted}


@pytest.mark.root
def test_guest_gets_file_capabilities_and_gives_none(cp: Cp, host: Path, guest: Path, vshd: Peers) -> None:
    (host / "ping").write_text("")
    try:
        give(host / "ping", {"security.capability": CAPABILITY, "trusted.x": b"1"})
    except PermissionError:
        pytest.skip("this root has no CAP_SETFCAP or CAP_SYS_ADMIN, as in a container")
    cp("ping", "m:ping", keep=KEEP)
    assert read(guest / "ping") == {"security.capability": CAPABILITY}
    cp("m:ping", "back", keep=KEEP)
    assert read(host / "back") == {}


def test_server_without_them_is_refused_before_anything_is_copied(cp: Cp, host: Path, guest: Path) -> None:
    """OpenSSH's has none."""
    (host / "f").write_text("new")
    with pytest.raises(MachineError, match="cannot copy: the SFTP server of 'm' has no extended attributes"):
        cp("f", "m:", keep=KEEP)
    assert list(guest.iterdir()) == []


def test_attribute_that_the_destination_does_not_take_fails_its_file_alone(
    cp: Cp, host: Path, guest: Path, vshd: Peers
) -> None:
    """The guest's /proc stands for a file system that has none."""
    for name in ("bad", "good"):
        (host / name).write_text(name)
    try:
        give(host / "bad", {f"user.{number}": b"x" for number in range(XATTRS_MAX + 1)})
    except OSError:
        pytest.skip("this file system takes few attributes for one file")
    with pytest.raises(CopyError, match="bad: it has too many extended attributes"):
        cp("bad", "good", "m:", keep=KEEP)
    assert [path.name for path in guest.iterdir()] == ["good"]


def test_lying_guest_sets_only_what_programs_keep(cp: Cp, host: Path, peers: Peers) -> None:
    tell(peers, "xattrs")
    cp("m:t/f", ".", keep=KEEP)
    assert read(host / "f") == {"user.good": b"1"}


def test_lying_guest_that_names_a_bad_attribute_fails(cp: Cp, host: Path, peers: Peers) -> None:
    tell(peers, "xattrs-name")
    with pytest.raises(CopyError, match=r"cannot set the attribute user\.x+.*: Numerical result out of range"):
        cp("m:t/f", ".", keep=KEEP)
    assert list(host.iterdir()) == []


def test_sync_makes_attributes_equal(
    host: Path,
    vshd: Peers,
    sides: tuple[Path, Path, str, str],  # noqa: F811
) -> None:
    source, sink, *words = sides
    wanted = make_source(source)

    def run(rules: Rules = Rules(), *, has_xattrs: bool = True) -> list[str]:  # noqa: B008  (it is frozen)
        told: list[str] = []
        tally = SyncTally()
        tally.tell = lambda action, path: told.append(f"{action} {os.fsdecode(path)}")
        sync(*plan_sync(words), vshd.connect, rules=rules, keep=Keep(xattrs=has_xattrs), tally=tally)
        return sorted(told)

    run()
    assert show(sink, wanted) == wanted
    assert run() == []
    give(sink / "plain", {"user.stale": b"1"})
    give(sink / "small", {"user.mime": b"other"})
    give(sink / "inner", {"user.stale": b"1"})
    os.removexattr(sink / "large", "user.bin")
    assert run(has_xattrs=False) == []
    changes = ["change inner/", "change large", "change plain", "change small"]
    assert run(Rules(dry_run=True)) == changes
    assert run() == changes
    assert show(sink, wanted) == wanted
    assert run(Rules(checksum=True)) == []


def test_changes_set_what_differs_and_remove_the_rest() -> None:
    wanted = ((b"user.a", b"1"), (b"user.b", b"2"))
    found = ((b"user.a", b"1"), (b"user.b", b"3"), (b"user.c", b"4"))
    assert find_changes(wanted, found) == ((b"user.b", b"2"), (b"user.c", None))
    assert find_changes(wanted, wanted) == ()


def test_each_side_takes_its_own_names() -> None:
    names = (b"user.a", b"security.capability", b"security.selinux", b"system.posix_acl_access", b"trusted.overlay.x")
    pairs = tuple((name, b"") for name in names)
    assert [name for name, _ in choose_for_host(pairs)] == [b"user.a"]
    assert [name for name, _ in choose_for_guest(pairs)] == [b"user.a", b"security.capability"]


def test_attributes_pass_the_wire() -> None:
    attributes = FileAttributes(
        size=1, mode=0o644, xattrs=((b"user.a", b"\0v"), (b"user.gone", None), (b"user.e", b""))
    )
    assert Cursor(memoryview(pack_attributes(attributes))).take_attributes() == attributes
    assert pack_attributes(attributes).count(XATTR) == 3
