"""The host's part of a guest's log: what a guest sends becomes lines of a file. A guest that lies costs one line."""

import asyncio
import json
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import cast

import pytest

from tests.vsh.live import DEADLINE_S
from vmkit.machine.words import TakeSyslog
from vmkit.monitor import connection, syslog
from vmkit.monitor.guest import LinkedGuest
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.syslog import SyslogKeeper
from vsh.errors import ConnectionLost, VshError
from vshd.carry.records import BEGIN, HAS_WRITER, ID_SIZE, MARK, SYSLOG, WORD_SIZE, LogRecord

COLLECTOR = b"c" * ID_SIZE


class PlayedGuest:
    """A guest as the keeper knows it. Each connection is an item of `served`, which plays the guest's end."""

    name, cid = "m", 3

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = EventLog(folder / "events.jsonl")
        self.asked: list[tuple[bytes, int]] = []
        self.served: list[Callable[[socket.socket], None] | VshError] = []
        self.open: list[socket.socket] = []

    def is_stopped(self) -> bool:
        return False

    def open_log(self, name: str) -> CappedLog:
        return CappedLog(self.folder / name, ceiling_bytes=20_000)

    def open_logs(self, collector: bytes, next_: int, timeout_s: float) -> tuple[int, bytes]:
        assert timeout_s > 0
        self.asked.append((collector, next_))
        play = self.served.pop(0)
        if isinstance(play, VshError):
            raise play
        ours, theirs = socket.socketpair()
        ours.settimeout(DEADLINE_S)
        self.open.append(ours)
        play(ours)
        return theirs.detach(), b""

    def close(self) -> None:
        self.events.close()
        for sock in self.open:
            sock.close()

    @property
    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "syslog.jsonl").read_text().splitlines()]

    @property
    def told(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]


def begin(number: int = 0, collector: bytes = COLLECTOR) -> bytes:
    return LogRecord(BEGIN, number, collector).encode()


def line(number: int, text: bytes = b"<14>text") -> bytes:
    return LogRecord(
        SYSLOG, number, text, flags=HAS_WRITER, time_ns=1_700_000_000_500_000_000, pid=7, uid=1000
    ).encode()


def mark(word: int) -> bytes:
    return LogRecord(MARK, word, b"").encode()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_FIRST_S", 0.01)


def run(folder: Path, work: Callable[[SyslogKeeper, PlayedGuest], Coroutine[None, None, None]]) -> PlayedGuest:
    """Runs work beside a keeper."""
    guest = PlayedGuest(folder)

    async def main() -> None:
        keeper = SyslogKeeper(cast("LinkedGuest", guest))
        keeping = asyncio.create_task(keeper.keep())
        try:
            await work(keeper, guest)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    try:
        asyncio.run(main())
    finally:
        guest.close()
    return guest


def serve(guest: PlayedGuest, *data: bytes, then: Callable[[socket.socket], None] = lambda _sock: None) -> None:
    """The next connection gets this."""

    def play(sock: socket.socket) -> None:
        sock.sendall(b"".join(data))
        then(sock)

    guest.served.append(play)


async def answer_marks(guest: PlayedGuest) -> None:
    """Answers each word on the newest connection."""
    loop = asyncio.get_running_loop()
    while not guest.open:
        await asyncio.sleep(0.001)
    sock = guest.open[-1]
    sock.setblocking(False)
    word = await loop.sock_recv(sock, WORD_SIZE)
    await loop.sock_sendall(sock, mark(int.from_bytes(word, "little")))


def test_what_the_guest_logged_is_in_the_file_when_it_was_asked_for(tmp_path: Path) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, begin(), line(0, b"<11>Nov 30 12:00:00 app[5]: \x1b[31mbad\n"), line(1))
        answering = asyncio.create_task(answer_marks(guest))
        assert (await keeper.answer(TakeSyslog())).ok
        await answering

    guest = run(tmp_path, work)
    first, second = guest.records
    assert guest.asked[0] == (b"", 0)
    assert first.pop("t") == second.pop("t")
    assert first == {
        "machine": "m",
        "cid": 3,
        "time": 1_700_000_000.5,
        "number": 0,
        "source": "syslog",
        "facility": "user",
        "priority": "err",
        "ident": "app",
        "pid": 7,
        "uid": 1000,
        "gid": 0,
        "text": "\x1b[31mbad",
        "claimed_pid": 5,
    }
    assert b"\x1b" not in (tmp_path / "syslog.jsonl").read_bytes()


def test_connection_that_broke_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, begin(), line(0), line(1), line(2)[:-1], then=socket.socket.close)
        guest.served.append(ConnectionLost("the guest is busy"))
        serve(guest, begin(2), line(2), then=lambda _sock: None)
        waiting = asyncio.create_task(keeper.answer(TakeSyslog()))
        while len(guest.open) < 2:
            await asyncio.sleep(0.001)
        await answer_marks(guest)
        assert (await waiting).ok

    guest = run(tmp_path, work)
    assert guest.asked == [(b"", 0), (COLLECTOR, 2), (COLLECTOR, 2)]
    assert [record["number"] for record in guest.records] == [0, 1, 2]


@pytest.mark.parametrize(
    ("sent", "dropped"),
    [
        ([begin(5), line(5)], [5]),
        ([begin(), line(0), line(3), line(4), line(5)], [2]),
        ([begin(), line(0), line(9), line(20)], [8, 10]),
        ([begin(), line(2**64 - 1), line(0), line(1)], [2**64 - 1]),
    ],
)
def test_records_that_are_missing_are_counted(tmp_path: Path, sent: list[bytes], dropped: list[int]) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, *sent)
        answering = asyncio.create_task(answer_marks(guest))
        assert (await keeper.answer(TakeSyslog())).ok
        await answering

    guest = run(tmp_path, work)
    missing = [record for record in guest.records if record["source"] == "vmkit"]
    assert [record["dropped"] for record in missing] == dropped
    assert str(missing[0]["text"]).startswith(f"{dropped[0]} records were dropped")


def test_collector_that_was_started_again_is_told(tmp_path: Path) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, begin(), line(0), line(1), then=socket.socket.close)
        serve(guest, begin(0, b"d" * ID_SIZE), line(0))
        waiting = asyncio.create_task(keeper.answer(TakeSyslog()))
        while len(guest.open) < 2:
            await asyncio.sleep(0.001)
        await answer_marks(guest)
        assert (await waiting).ok

    texts = [record["text"] for record in run(tmp_path, work).records]
    assert texts == ["text", "text", "the guest's collector was started again: records may be missing", "text"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 100,
        begin(0, b""),
        begin(0, b"x" * 17),
        begin() + line(0) + (8193).to_bytes(4, "little") + bytes(40),
    ],
    ids=["noise", "no id", "long id", "long record"],
)
def test_guest_that_sends_no_log_is_given_up_with_one_line(tmp_path: Path, sent: bytes) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, sent)
        answer = await keeper.answer(TakeSyslog())
        assert not answer.ok
        assert answer.error.startswith("the guest sends no log: ")
        assert await keeper.answer(TakeSyslog()) == answer

    guest = run(tmp_path, work)
    assert [event["event"] for event in guest.told] == ["no-syslog"]
    assert len(guest.asked) == 1


def test_guest_without_the_service_is_told(tmp_path: Path) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        guest.served.append(VshError("the vshd of m knows no logs"))
        assert (await keeper.answer(TakeSyslog())).error == "the vshd of m knows no logs"

    guest = run(tmp_path, work)
    assert [event["why"] for event in guest.told] == ["the vshd of m knows no logs"]
    assert not (tmp_path / "syslog.jsonl").exists()


def test_flood_of_a_guest_has_a_bound(tmp_path: Path) -> None:
    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, begin())
        waiting = asyncio.create_task(keeper.answer(TakeSyslog()))
        answering = asyncio.create_task(answer_marks(guest))
        assert (await waiting).ok
        await answering
        loop = asyncio.get_running_loop()
        for number in range(2000):
            await loop.sock_sendall(guest.open[0], line(number))
        answering = asyncio.create_task(answer_marks(guest))
        assert (await keeper.answer(TakeSyslog())).ok
        await answering

    guest = run(tmp_path, work)
    assert guest.records[-1]["number"] == 1999
    sizes = [os.path.getsize(tmp_path / name) for name in ("syslog.jsonl", "syslog.jsonl.1")]
    assert all(0 < size <= 20_000 for size in sizes)


def test_guest_that_does_not_answer_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syslog, "ANSWER_S", 0.05)

    async def work(keeper: SyslogKeeper, guest: PlayedGuest) -> None:
        serve(guest, begin())
        answer = await keeper.answer(TakeSyslog())
        assert (answer.ok, answer.hint) == (False, "it may be paused or stuck")

    run(tmp_path, work)
