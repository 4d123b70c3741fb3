"""Cores that a guest sends become crashes, with limits that hold for a guest that lies."""

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from tests.descriptors import nothing_left_open
from vmkit.crashes.record import CrashKind
from vmkit.crashes.store import list_all
from vmkit.machine.launch import CrashPlan
from vmkit.monitor import connection
from vmkit.monitor import cores as module
from vmkit.monitor.cores import CoreKeeper, CoreReceiver
from vmkit.monitor.guest import LinkedGuest
from vmkit.monitor.logs import EventLog
from vsh.errors import ExecError, Unreachable, VshError
from vshd.wire import cores, messages
from vshd.wire.cores import CoreFacts, encode
from vshd.wire.errors import RemoteProtocolError

Events = list[tuple[str, Mapping[str, object]]]


def make_facts() -> CoreFacts:
    facts = CoreFacts()
    facts.pid, facts.uid, facts.gid, facts.signal, facts.time_s = 7, 1000, 1000, 6, 1_700_000_000
    facts.name, facts.command, facts.exe = b"web", b"web\0--port\x0080\0", b"/usr/bin/w\xffb"
    facts.maps, facts.cgroup, facts.is_contained = b"00400000-00401000 r-xp\n", b"0::/c", True
    return facts


def make_core(core: bytes, end: int = cores.WHOLE) -> bytes:
    pieces = [core[at : at + 1000] for at in range(0, len(core), 1000)]
    data = b"".join(encode(cores.DATA, piece) for piece in pieces)
    return encode(cores.BEGIN, make_facts().encode()) + data + encode(cores.END, bytes((end,)))


def make_receiver(root: Path, events: Events) -> CoreReceiver:
    plan = CrashPlan(root, 1 << 30, cores=True)
    return CoreReceiver(plan, "m", {"image": "tiny", "digest": "d"}, lambda name, data: events.append((name, data)))


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_core_is_kept_with_its_facts(tmp_path: Path, size: int) -> None:
    core = b"\x7fELF" + os.urandom(5000) + bytes(20_000)
    core += bytes(9) + b"end" + bytes(7)
    stream = encode(cores.LOST, b"\5\0\0\0") + make_core(core[:-19])
    holes = cores.encode_hole(9) + encode(cores.DATA, b"end") + cores.encode_hole(7)
    end = encode(cores.END, bytes((cores.WHOLE,)))
    stream = stream.removesuffix(end) + holes + end
    events: Events = []
    receiver = make_receiver(tmp_path, events)
    for at in range(0, len(stream), size):
        receiver.feed(stream[at : at + size])
    receiver.close()
    (kept,) = list_all(tmp_path)
    crash = kept.crash
    assert crash is not None
    assert crash.kind is CrashKind.CORE
    assert crash.brief == "web (pid 7, uid 1000) in a container was ended by signal 6 (SIGABRT)"
    assert crash.trouble == ""
    assert crash.program is not None
    assert crash.program.command == ("web", "--port", "80")
    assert os.fsencode(crash.program.exe) == b"/usr/bin/w\xffb"
    assert (crash.program.cgroup, crash.program.is_contained, crash.program.is_whole) == ("0::/c", True, True)
    assert (kept.folder / "core").read_bytes() == core
    assert (kept.folder / "maps").read_bytes() == b"00400000-00401000 r-xp\n"
    assert {(kept.folder / name).stat().st_mode & 0o777 for name in ("core", "maps", "crash.json")} == {0o600}
    assert events[0] == ("cores-lost", {"count": 5})
    assert events[1][0] == "crash"


def test_core_whose_connection_breaks_is_kept_in_part(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, [])
    receiver.feed(make_core(b"x" * 5000)[:-10])
    receiver.close()
    (kept,) = list_all(tmp_path)
    assert kept.crash is not None
    assert kept.crash.program is not None
    assert not kept.crash.program.is_whole
    assert kept.crash.trouble == "the core is not whole"
    assert len((kept.folder / "core").read_bytes()) >= 4000


@pytest.mark.parametrize("end", [cores.CUT, cores.BROKEN])
def test_core_that_the_guest_cut_is_not_whole(tmp_path: Path, end: int) -> None:
    receiver = make_receiver(tmp_path, [])
    receiver.feed(make_core(b"x", end))
    (kept,) = list_all(tmp_path)
    assert kept.crash is not None
    assert kept.crash.trouble == "the core is not whole"
    receiver.close()


def test_core_of_a_guest_that_lies_about_its_size_has_a_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CORE_BYTES", 10_000)
    receiver = make_receiver(tmp_path, [])
    receiver.feed(make_core(b"x" * 1_000_000))
    (kept,) = list_all(tmp_path)
    assert kept.crash is not None
    assert kept.crash.trouble == "the core is larger than there is room for"
    assert (kept.folder / "core").stat().st_size <= 10_000
    receiver.feed(make_core(b"next"))
    assert len(list_all(tmp_path)) == 2
    receiver.close()


def test_flood_of_cores_is_counted_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST", 3)
    events: Events = []
    receiver = make_receiver(tmp_path, events)
    for _ in range(10):
        receiver.feed(make_core(b"x"))
    receiver.close()
    assert len(list_all(tmp_path)) == 3
    # Few events, whatever their number.
    assert [data["count"] for name, data in events if name == "cores-lost"] == [1, 6]


def test_core_that_is_nothing_but_zeros_has_a_ceiling(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, [])
    hole = cores.encode_hole((1 << 64) - 1)
    receiver.feed(encode(cores.BEGIN, b"") + hole + hole + encode(cores.DATA, b"x") + encode(cores.END, b"\0"))
    (kept,) = list_all(tmp_path)
    assert kept.crash is not None
    assert kept.crash.trouble == "the core is larger than there is room for"
    assert (kept.folder / "core").stat().st_size == 0
    receiver.close()


def test_record_of_a_guest_that_lies_can_be_read(tmp_path: Path) -> None:
    facts = CoreFacts()
    facts.name = facts.command = facts.exe = facts.cgroup = "\U0001f600".encode() * 60_000
    facts.pid = facts.signal = (1 << 32) - 1
    receiver = make_receiver(tmp_path, [])
    receiver.feed(encode(cores.BEGIN, facts.encode()) + encode(cores.END, b"\0"))
    (kept,) = list_all(tmp_path)
    assert kept.crash is not None, kept.damage
    assert kept.crash.brief.endswith("was ended by signal 4294967295")
    receiver.close()


class PlayedGuest:
    """A guest as the keeper knows it. An item of `served` is what a connection brings, or how it fails."""

    name, record = "m", {"image": "tiny", "digest": "d"}

    def __init__(self, folder: Path, *served: bytes | VshError) -> None:
        self.events = EventLog(folder / "events.jsonl")
        self.crashes = CrashPlan(folder / "crashes", 1 << 30, cores=True)
        self.served = list(served)

    def is_stopped(self) -> bool:
        return False

    def open_cores(self, size_max: int, timeout_s: float) -> tuple[int, bytes]:
        assert size_max > 0
        assert timeout_s > 0
        play = self.served.pop(0)
        if isinstance(play, VshError):
            raise play
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(play[10:])
        return theirs.detach(), play[:10]


def keep(folder: Path, *served: bytes | VshError) -> list[dict[str, object]]:
    """Runs a keeper until it gives up; its events."""
    guest = PlayedGuest(folder, *served)
    asyncio.run(CoreKeeper(cast("LinkedGuest", guest)).keep())
    guest.events.close()
    assert not guest.served
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_connection_that_breaks_is_made_anew_and_a_refusal_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETRY_FIRST_S", 0.01)
    with nothing_left_open():
        told = keep(
            *(tmp_path, make_core(b"one")[:-3], Unreachable("not yet"), make_core(b"two")),
            VshError("the guest knows no cores"),
        )
    assert [event["event"] for event in told] == ["cores", "crash", "cores", "crash", "no-cores"]
    assert told[-1]["why"] == "the guest knows no cores"
    kept = list_all(tmp_path / "crashes")
    assert [one.crash is not None and one.crash.trouble for one in kept] == ["the core is not whole", ""]


def test_refusal_that_passes_is_told_once_and_the_cores_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(module, "REFUSED_S", 0.01)
    taken = ExecError("the guest's cores go elsewhere", kind=messages.BUSY)
    told = keep(tmp_path, taken, taken, make_core(b"one"), taken, VshError("no cores there"))
    assert [event["event"] for event in told] == ["no-cores", "cores", "crash", "no-cores", "no-cores"]
    why = [event["why"] for event in told if event["event"] == "no-cores"]
    assert why == [str(taken), str(taken), "no cores there"]
    assert len(list_all(tmp_path / "crashes")) == 1


def test_guest_that_sends_no_frames_is_left(tmp_path: Path) -> None:
    assert [event["event"] for event in keep(tmp_path, b"GET / HTTP/1.1" * 10)] == ["cores", "no-cores"]


def test_guest_that_breaks_the_order_leaves_nothing_open(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, [])
    with pytest.raises(RemoteProtocolError):
        receiver.feed(encode(cores.DATA, b"x"))
    receiver.close()
    assert list_all(tmp_path) == []


def test_folder_that_takes_no_crash_loses_it_and_nothing_else(tmp_path: Path) -> None:
    events: Events = []
    (tmp_path / "file").write_text("")
    receiver = make_receiver(tmp_path / "file", events)
    receiver.feed(make_core(b"x" * 5000) + encode(cores.LOST, b"\1\0\0\0"))
    receiver.close()
    assert [name for name, _ in events] == ["no-crash", "cores-lost"]
