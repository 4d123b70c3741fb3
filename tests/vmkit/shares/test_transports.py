"""Which transport a share gets: the first that the guest has, or the one that its user names."""

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmkit.errors import ConfigError, MachineError
from vmkit.shares import transports
from vmkit.shares.place import SharedPlace
from vmkit.shares.transports import NAMES, Transport, connect, find_transports, render_title
from vsh import share as asking
from vsh.address import UNIX, Address
from vsh.errors import ExecError
from vshd.flags import Options
from vshd.services.share import open_service
from vshd.services.table import Surroundings
from vshd.session.refusal import RefusalError
from vshd.wire import messages
from vshd.wire.requests import Share

PLACE = SharedPlace(Path("/src"), "/mnt/src")
ROWS = (Transport("first", "the first", "share_by_first"), Transport("second", "the second", "share_by_second"))
MODULE = """
from vsh.errors import ExecError

def connect(machine, place, folder):
    {}
"""


class Ways:
    """Two transports, of modules that are in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def accept(self, name: str) -> None:
        (self._folder / f"share_by_{name}.py").write_text(MODULE.format("return machine"))

    def refuse(self, name: str, brief: str, kind: int = messages.UNSUPPORTED) -> None:
        (self._folder / f"share_by_{name}.py").write_text(MODULE.format(f"raise ExecError({brief!r}, kind={kind})"))


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    monkeypatch.setattr(transports, "TRANSPORTS", ROWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for row in ROWS:
        monkeypatch.delitem(sys.modules, row.module, raising=False)
    ways = Ways(tmp_path)
    for row in ROWS:
        ways.accept(row.name)
    yield ways
    for row in ROWS:
        sys.modules.pop(row.module, None)


def test_share_has_the_first_transport(ways: Ways) -> None:
    assert connect("my", PLACE, -1, "")[0] is ROWS[0]


def test_transport_that_the_guest_lacks_gives_way_to_the_next(ways: Ways) -> None:
    ways.refuse("first", "no first")
    assert connect("my", PLACE, -1, "")[0] is ROWS[1]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_shows_no_memory_to_the_folders_owner_but_by_name(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (replace(ROWS[0], shows_memory=True), ROWS[1])
    monkeypatch.setattr(transports, "TRANSPORTS", rows)
    assert connect("my", PLACE, -1, "")[0] is rows[1]
    assert connect("my", PLACE, -1, "first")[0] is rows[0]
    monkeypatch.delitem(sys.modules, rows[1].module)
    ways.refuse("second", "no second")
    with pytest.raises(MachineError, match=r"root has the first only by name: .*; no second"):
        connect("my", PLACE, -1, "")


def test_guest_that_lacks_every_transport_is_explained(ways: Ways) -> None:
    ways.refuse("first", "no first")
    ways.refuse("second", "no second")
    with pytest.raises(MachineError, match="my cannot have /src: no first; no second"):
        connect("my", PLACE, -1, "")


def test_named_transport_is_the_only_one(ways: Ways) -> None:
    ways.refuse("second", "no second")
    with pytest.raises(MachineError, match="my cannot have /src: no second"):
        connect("my", PLACE, -1, "second")
    with pytest.raises(ConfigError, match="has the name 'third'"):
        find_transports("third")


def test_other_refusal_is_the_end(ways: Ways) -> None:
    """A place that the guest cannot have is no reason to try another transport."""
    ways.refuse("first", "/proc is a mount point already", messages.BUSY)
    with pytest.raises(ExecError, match="mount point"):
        connect("my", PLACE, -1, "")


def test_titles_are_those_of_the_table() -> None:
    assert render_title("fuse") == "FUSE over vsock"
    assert all(map(render_title, NAMES))
    assert render_title("of a later version") == "of a later version"


def test_vshd_refuses_a_way_that_it_does_not_know() -> None:
    around = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)
    with pytest.raises(RefusalError, match="cannot share by smoke signals") as refused:
        open_service(Share(path=b"/mnt/x", by=b"smoke signals"), -1, around)
    assert refused.value.failure.kind == messages.UNSUPPORTED


def test_vshd_that_does_not_know_the_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one mounts FUSE, whatever it is asked for."""
    ours, theirs = socket.socketpair()

    def opened(*_words: object, **_more: object) -> tuple[int, bytes, str]:
        return ours.detach(), b"", "fuse"

    monkeypatch.setattr(asking, "open_service", opened)
    with theirs, pytest.raises(ExecError, match="older than shares by 9p") as refused:
        asking.open_share(Address(UNIX, name="my"), Share(path=b"/mnt/x", by=b"9p"), timeout_s=1.0)
    assert refused.value.kind == messages.UNSUPPORTED
