"""Keeps the log of a guest on the host: what its programs and its kernel log, as JSON lines in the machine's directory.

The connection to the guest's collector opens soon after READY, and stays. One that breaks is made anew, and goes on
with the record that is missing. A record that the guest had no room for is missing for good; a line has the number of
those.
"""

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from vmkit.machine.launch import Layout
from vmkit.machine.words import Answer, Request, TakeSyslog
from vmkit.monitor.connection import connect, keep_connected
from vmkit.monitor.lines import parse_record
from vsh.errors import VshError
from vshd.carry.records import BEGIN, ID_SIZE, MARK, NUMBER_MAX, WORD_SIZE, LogReader, LogRecord, RecordError

if TYPE_CHECKING:
    from vmkit.monitor.guest import LinkedGuest
    from vmkit.monitor.logs import CappedLog

# The commands that follow READY have the guest's processor to themselves. The guest keeps what it logs meanwhile.
FIRST_S = 2.0
# A guest under emulation on a busy host takes seconds for a session.
CONNECT_S = 20.0
ANSWER_S = 20.0
# Some 500 records: the monitor has other things to do between two pieces.
READ_SIZE = 1 << 16
WRITE_LINES = 16


class BadStream(Exception):  # noqa: N818 - of the guest, and no fault of ours
    """The guest sends what is no log; the text says what."""


class SyslogKeeper:
    """The log of one guest. Invariant: the host has all records before `_next` of the collector `_collector`."""

    name: ClassVar[str] = "syslog"
    requests: ClassVar[tuple[type[Request], ...]] = (TakeSyslog,)

    def __init__(self, guest: "LinkedGuest") -> None:
        self._guest = guest
        self._log: CappedLog | None = None
        self._collector = b""
        self._next = 0
        self._sock: socket.socket | None = None
        self._wanted = asyncio.Event()
        # Why there is no log, or no more of it.
        self._trouble = ""
        self._words = itertools.count(1)
        self._marks: dict[int, asyncio.Future[None]] = {}
        guest.await_syslog = self._synchronize

    async def keep(self) -> None:
        """Connects, reads and connects again, until cancelled or the guest turns out to have no log."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_S):
                await self._wanted.wait()
        try:
            await keep_connected(self._follow, self._guest.is_stopped)
        except (VshError, BadStream) as error:
            self._guest.events.add("no-syslog", {"why": str(error)})
            self._give_up(str(error))
        finally:
            self._give_up("the machine has ended")

    async def answer(self, request: Request) -> Answer:
        """Answers when all that the guest has logged until now is in the file."""
        return await self._synchronize()

    async def _synchronize(self) -> Answer:
        if self._guest.is_stopped():
            return Answer(False, "the guest is paused", f"let it run: vmkit resume {self._guest.name}")
        word = next(self._words)
        mark: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._trouble:
            self._marks[word] = mark
            self._wanted.set()
            try:
                self._ask([word])
                async with asyncio.timeout(ANSWER_S):
                    await mark
            except TimeoutError:
                return Answer(
                    False, f"the guest did not send its log within {ANSWER_S:g} s", "it may be paused or stuck"
                )
            finally:
                self._marks.pop(word, None)
        return Answer(False, self._trouble) if self._trouble else Answer(True)

    def _give_up(self, why: str) -> None:
        self._trouble = self._trouble or why
        for mark in self._marks.values():
            if not mark.done():
                mark.set_result(None)

    async def _follow(self) -> None:
        """One connection, from its beginning to its end. Raises VshError, BadStream."""
        fd, rest = await connect(
            partial(self._guest.open_logs, self._collector, min(self._next, NUMBER_MAX), CONNECT_S)
        )
        if self._log is None:
            self._log = self._guest.open_log(Layout.SYSLOG)
        with socket.socket(fileno=fd) as sock:
            sock.setblocking(False)
            self._sock = sock
            try:
                self._ask(self._marks)
                await self._read(sock, rest)
            except OSError:
                # The guest has gone, or its vshd has.
                pass
            finally:
                self._sock = None

    def _ask(self, words: Iterable[int]) -> None:
        """Asks for a mark. A guest that reads nothing gets none, and the asker's time runs out."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.send(b"".join(word.to_bytes(WORD_SIZE, "little") for word in words))

    async def _read(self, sock: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        reader = LogReader()
        while True:
            self._take(reader, data)
            # sock_recv() does not wait as long as there is something to read.
            await asyncio.sleep(0)
            data = await loop.sock_recv(sock, READ_SIZE)
            if not data:
                return

    def _take(self, reader: LogReader, data: bytes) -> None:
        """Writes what has come, and answers those who wait for it. Raises BadStream."""
        try:
            records = reader.feed(data)
        except RecordError as error:
            raise BadStream(f"the guest sends no log: {error}") from error
        now_s = round(time.time(), 3)
        lines: list[bytes] = []
        marks = []
        for record in records:
            if record.source == BEGIN:
                self._begin(record, now_s, lines)
            elif record.source == MARK:
                marks.append(record.number)
            else:
                self._miss(record.number, now_s, lines)
                self._next = record.number + 1
                lines.append(render_line(self._guest, parse_record(record), now_s))
        for start in range(0, len(lines), WRITE_LINES):
            # A file that rolls over begins with a whole line.
            if self._log is not None:
                self._log.write(b"".join(lines[start : start + WRITE_LINES]))
        for word in marks:
            mark = self._marks.get(word)
            if mark is not None and not mark.done():
                mark.set_result(None)

    def _begin(self, record: LogRecord, now_s: float, lines: list[bytes]) -> None:
        if len(record.text) != ID_SIZE:
            raise BadStream("the guest sends no log: it does not begin with the id of a collector")
        if self._collector and record.text != self._collector:
            text = "the guest's collector was started again: records may be missing"
            lines.append(render_line(self._guest, make_own(text, now_s), now_s))
            self._next = 0
        self._collector = record.text
        self._miss(record.number, now_s, lines)
        self._next = record.number

    def _miss(self, number: int, now_s: float, lines: list[bytes]) -> None:
        """Writes how many records are missing before this one."""
        count = number - self._next
        if count > 0:
            text = f"{count} records were dropped: the guest logged more than it could keep for the host"
            lines.append(render_line(self._guest, make_own(text, now_s, dropped=count), now_s))


def make_own(text: str, now_s: float | None = None, **more: object) -> dict[str, object]:
    """A record of vmkit's about the log. now_s: since 1970."""
    time_s = round(time.time(), 3) if now_s is None else now_s
    value = {"time": time_s, "source": "vmkit", "facility": "syslog", "priority": "warn", "ident": "vmkit"}
    return {**value, "pid": None, "uid": None, "gid": None, "text": text, **more}


def render_line(guest: "LinkedGuest", value: dict[str, object], now_s: float | None = None) -> bytes:
    """A record as the line of the file: with the host's time, and the machine that it is of."""
    arrived_s = round(time.time(), 3) if now_s is None else now_s
    return json.dumps({"t": arrived_s, "machine": guest.name, "cid": guest.cid, **value}).encode() + b"\n"
