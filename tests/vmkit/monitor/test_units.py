"""Failures of services that a guest reports become crashes, with limits that hold for a guest that lies."""

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.descriptors import nothing_left_open
from tests.vmkit.monitor.test_cores import make_core, make_facts, make_receiver
from vmkit.crashes.record import CrashKind, FailedService, ServiceEnd
from vmkit.crashes.store import list_all
from vmkit.machine.launch import CrashPlan
from vmkit.monitor import connection
from vmkit.monitor import units as module
from vmkit.monitor.guest import LinkedGuest
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.units import UnitKeeper, describe, make_service, read_lines
from vsh.errors import ExecError, Unreachable, VshError
from vshd.wire import cores, messages, units
from vshd.wire.cores import encode as encode_core
from vshd.wire.units import UnitFacts, encode


def make_unit(name: str = "web", number: int = 1, result: bytes = b"exit-code") -> UnitFacts:
    facts = UnitFacts()
    facts.unit, facts.result, facts.invocation = f"{name}.service".encode(), result, bytes((number,)) * 16
    facts.code, facts.status, facts.pid, facts.time_s = units.EXITED, 3, 40 + number, 1_700_000_000
    return facts


def make_killed() -> UnitFacts:
    """The failure whose main process left the core of tests.vmkit.monitor.test_cores."""
    facts = make_unit(result=b"core-dump")
    core = make_facts()
    facts.code, facts.status, facts.pid = units.DUMPED, core.signal, core.pid
    return facts


def render(*found: UnitFacts) -> bytes:
    return b"".join(encode(units.FAILED, facts.encode()) for facts in found)


class PlayedGuest:
    """A guest as the keeper knows it. An item of `served` is what a connection brings, or how it fails."""

    name, record = "m", {"image": "debian", "digest": "d"}

    def __init__(self, folder: Path, *served: bytes | VshError) -> None:
        self.events = EventLog(folder / "events.jsonl")
        self.crashes = CrashPlan(folder / "crashes", 1 << 30, cores=True, root="/disk")
        self.served = list(served)
        self.log = CappedLog(folder / "syslog.jsonl")
        # What the guest's log has after each wait for it.
        self.lines: list[bytes] = []

    def is_stopped(self) -> bool:
        return False

    def open_log(self, name: str) -> CappedLog:
        assert name == "syslog.jsonl"
        return self.log

    async def await_syslog(self) -> None:
        if self.lines:
            self.log.write(self.lines.pop(0))

    def open_units(self, timeout_s: float) -> tuple[int, bytes]:
        assert timeout_s > 0
        play = self.served.pop(0)
        if isinstance(play, VshError):
            raise play
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(play[10:])
        return theirs.detach(), play[:10]


NONE = ExecError("this guest has no systemd", kind=messages.NOT_FOUND)


def keep(folder: Path, *served: bytes | VshError, lines: tuple[bytes, ...] = ()) -> list[dict[str, object]]:
    """Runs a keeper until the guest turns out to have no systemd; its events."""
    guest = PlayedGuest(folder, *served, NONE)
    guest.lines = list(lines)
    asyncio.run(UnitKeeper(cast("LinkedGuest", guest)).keep())
    guest.events.close()
    guest.log.close()
    assert not guest.served
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    monkeypatch.setattr(module, "REFUSED_S", 0.01)
    monkeypatch.setattr(module, "LOG_PAUSE_S", 0.0)


def make_line(**record: object) -> bytes:
    return json.dumps({"time": 1_700_000_000.5, **record}).encode() + b"\n"


def test_failure_is_kept_with_its_facts_and_the_last_lines_of_its_log(tmp_path: Path) -> None:
    other = make_line(unit="db.service", pid=7, uid=0, text="of another")
    own = make_line(unit="web.service", pid=41, uid=0, text="last words") + make_line(text=7) + b"[]\nno line\n"
    own += make_line(pid=1, uid=1000, text="web.service: a forged word")
    last = make_line(unit="init.scope", pid=1, uid=0, text="web.service: Failed with result 'exit-code'.")
    with nothing_left_open():
        events = keep(tmp_path, render(make_unit()), lines=(other + own, last))
    assert [event["event"] for event in events] == ["services", "crash"]
    (kept,) = list_all(tmp_path / "crashes")
    crash = kept.crash
    assert crash is not None
    assert (crash.kind, crash.image, crash.root, crash.program) == (CrashKind.SERVICE, "debian", "/disk", None)
    assert crash.brief == "web.service failed: exit-code, its main process (pid 41) exited with 3"
    assert crash.service == FailedService(
        *("web.service", "exit-code", ServiceEnd.EXITED, 3, 41, "01" * 16, 1_700_000_000, 0),
        is_restarted=False,
        log=("last words", "web.service: Failed with result 'exit-code'."),
    )
    assert events[1]["folder"] == str(kept.folder)


def test_lines_of_an_older_journal_are_known_by_their_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [make_line(pid=41, uid=0, text=f"line {number}") for number in range(50)]
    log.write_bytes(b"half of a line\n" + b"".join(lines) + make_line(pid=42, uid=0, text="another's"))
    found = read_lines(log, make_unit())
    assert found == (tuple(f"line {number}" for number in range(30, 50)), False)
    assert read_lines(tmp_path / "none", make_unit()) == ((), False)


def test_last_word_of_the_run_before_is_not_the_last(tmp_path: Path) -> None:
    log = tmp_path / "log"
    word = "web.service: Failed with result 'exit-code'."
    log.write_bytes(make_line(time=1_699_999_990.0, pid=1, uid=0, text=word))
    assert read_lines(log, make_unit()) == ((word,), False)
    log.write_bytes(make_line(time=1_699_999_999.5, pid=1, uid=0, text=word))
    assert read_lines(log, make_unit()) == ((word,), True)


def test_failure_that_comes_again_by_a_new_connection_is_one(tmp_path: Path) -> None:
    first, second = make_unit(), make_unit(number=2)
    keep(tmp_path, render(first), Unreachable("not yet"), render(first, second), render(second))
    assert [
        kept.crash and kept.crash.service and kept.crash.service.pid for kept in list_all(tmp_path / "crashes")
    ] == [
        41,
        42,
    ]


def test_core_and_the_failure_of_its_service_are_one_crash(tmp_path: Path) -> None:
    facts = make_facts()
    facts.cgroup = b"0::/system.slice/web.service/worker"
    core = encode_core(cores.BEGIN, facts.encode()) + make_core(b"\x7fELF")[5 + len(make_facts().encode()) :]

    def send_core() -> None:
        receiver = make_receiver(tmp_path / "crashes", [])
        receiver.feed(core)
        receiver.close()

    def send_failure() -> None:
        keep(tmp_path, render(make_killed()))

    for order in ((send_core, send_failure), (send_failure, send_core)):
        check_one(tmp_path, order)


def check_one(folder: Path, order: tuple[Callable[[], None], ...]) -> None:
    for step in order:
        step()
    (kept,) = list_all(folder / "crashes")
    crash = kept.crash
    assert crash is not None
    assert crash.kind is CrashKind.CORE
    assert crash.brief == ("web.service failed: web (pid 7, uid 1000) in a container was ended by signal 6 (SIGABRT)")
    assert crash.service is not None
    assert (crash.service.result, crash.service.end) == ("core-dump", ServiceEnd.DUMPED)
    assert kept.core.read_bytes() == b"\x7fELF"
    for path in kept.folder.iterdir():
        path.unlink()
    kept.folder.rmdir()


def test_core_of_another_process_stays_a_crash_of_its_own(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path / "crashes", [])
    receiver.feed(make_core(b"x"))
    keep(tmp_path, render(make_killed()))
    assert [kept.crash and kept.crash.kind for kept in list_all(tmp_path / "crashes")] == [
        CrashKind.CORE,
        CrashKind.SERVICE,
    ]


def test_number_of_failures_has_a_limit_and_lost_ones_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST", 3)
    many = [make_unit(number=number) for number in range(1, 21)]
    lost = encode(units.LOST, b"\7\0\0\0")
    events = keep(tmp_path, lost + render(*many), lost + render(*many))
    assert len(list_all(tmp_path / "crashes")) == 3
    assert sum(cast("int", event["count"]) for event in events if event["event"] == "services-lost") == 7 + 17 + 7 + 17
    # A guest that lies must not fill the events.
    assert len([event for event in events if event["event"] == "services-lost"]) <= 4


@pytest.mark.parametrize(
    ("error", "events"),
    [
        (VshError("the guest knows no failed services"), ["no-services"]),
        (ExecError("not now", kind=messages.OTHER), ["no-services", "services", "crash"]),
    ],
)
def test_refusal_is_told_and_tried_again_where_it_may_pass(tmp_path: Path, error: VshError, events: list[str]) -> None:
    more: tuple[bytes | VshError, ...] = (render(make_unit()), NONE) if len(events) > 1 else ()
    guest = PlayedGuest(tmp_path, error, *more)
    asyncio.run(UnitKeeper(cast("LinkedGuest", guest)).keep())
    assert not guest.served
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == events
    guest.events.close()
    guest.log.close()


def test_guest_that_sends_no_frames_is_left(tmp_path: Path) -> None:
    guest = PlayedGuest(tmp_path, b"GET / HTTP/1.1" * 10)
    asyncio.run(UnitKeeper(cast("LinkedGuest", guest)).keep())
    told = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert told == ["services", "no-services"]
    guest.events.close()
    guest.log.close()


def test_machine_without_cores_asks_for_nothing(tmp_path: Path) -> None:
    guest = PlayedGuest(tmp_path)
    guest.crashes = CrashPlan(tmp_path, 1 << 30)
    asyncio.run(UnitKeeper(cast("LinkedGuest", guest)).keep())
    assert (tmp_path / "events.jsonl").read_text() == ""
    guest.events.close()
    guest.log.close()


def test_folder_that_takes_no_crash_loses_it_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "crashes").write_text("")
    assert [event["event"] for event in keep(tmp_path, render(make_unit()))] == ["services", "no-crash"]


def test_record_of_a_guest_that_lies_can_be_read(tmp_path: Path) -> None:
    facts = make_unit()
    facts.unit = facts.result = facts.invocation = "\U0001f600".encode() * 300
    facts.code = facts.status = facts.pid = facts.restarts = (1 << 32) - 1
    facts.time_s = (1 << 64) - 1
    lines = tuple("\U0001f600" * 100_000 for _ in range(100))
    keep(tmp_path, render(facts), lines=(make_line(unit="x", text=lines[0]),))
    (kept,) = list_all(tmp_path / "crashes")
    assert kept.crash is not None, kept.damage


@pytest.mark.parametrize(
    ("code", "status", "end"),
    [
        (units.NO_END, 3, ""),
        (9, 3, ""),
        (units.KILLED, 9, ", its main process (pid 41) was ended by signal 9 (SIGKILL)"),
        (units.DUMPED, 100, ", its main process (pid 41) was ended by signal 100"),
    ],
)
def test_end_of_the_main_process_is_in_words(code: int, status: int, end: str) -> None:
    facts = make_unit(result=b"timeout")
    facts.code, facts.status = code, status
    assert describe(make_service(facts)) == f"web.service failed: timeout{end}"
