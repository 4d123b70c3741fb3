"""Collects the log of a guest, and sends it to the host that asks for it (docs/reference/protocol.md 8).

The process never waits for the host. Records that the host does not read in time are forgotten, oldest first, and their
numbers are missing in what it reads later. The host's connection comes from vshd, as a descriptor over a socket: so the
checks of vshd are those of this service, and no process of a session stays for it.
"""

import _socket
import os
import select
import sys
import time

from vshd.carry.records import BEGIN, COLLECTOR, ID_SIZE, MARK, WORD_SIZE, encode_header
from vshd.signals import SIGTERM
from vshd.syslog.kept import KeptRecords
from vshd.syslog.sources import NOBODY, SCM_CREDENTIALS, KernelSource, SocketSource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vshd.signals import Wakeup
    from vshd.syslog.journal import JournalSource

    Source = SocketSource | KernelSource | JournalSource

# What one write() to the host takes at most.
SEND_SIZE = 1 << 16
# Words of the host that it waits for the answers to.
MARKS_MAX = 16
# Turns of a source, each of sources.AT_ONCE records, before a MARK is answered.
DRAIN_TURNS = 16
# A guest that is ending: the log is over when no line has come for so long, or at the latest.
QUIET_MS = 20
LAST_WORDS_S = 1.0
# The host's connection, what it asks for (vshd.services.logs), and what it has sent since.
HANDED_SIZE = ID_SIZE + WORD_SIZE
HANDED_MAX = HANDED_SIZE + WORD_SIZE * MARKS_MAX
WARNING, NOTICE = 4, 5
FACILITY_SYSLOG = 5 << 3


class Collector:
    """Invariant: `_host` is the host's connection, or -1; of what it is to get, `_out` is encoded, then come the
    records from `_next` on, and the answers to `_marks` behind the records with those numbers.
    """

    def __init__(
        self,
        sources: "Sequence[Source]",
        handed: _socket.socket,
        kept: KeptRecords | None = None,
    ) -> None:
        """handed: the socket over which vshd hands on the host's connection."""
        self._sources = {source.fd: source for source in sources}
        self._handed = handed
        self._kept = KeptRecords() if kept is None else kept
        self._id = os.urandom(ID_SIZE)
        self._host = -1
        self._next = 0
        self._out = b""
        self._held = b""
        self._marks: list[tuple[int, int]] = []
        self._told_lost = 0
        self._poll = select.poll()
        for fd in (*self._sources, handed.fileno()):
            self._poll.register(fd, select.POLLIN)

    def run(self, wakeup: "Wakeup") -> None:
        """Collects until SIGTERM, and then until no more lines come."""
        self._poll.register(wakeup.fd, select.POLLIN)
        for source in list(self._sources.values()):
            if isinstance(source, KernelSource):
                # The boot is older than the first line of a program.
                self._drain(source)
        while True:
            for fd, events in self._poll.poll():
                if fd == wakeup.fd:
                    if SIGTERM in wakeup.take():
                        self._finish()
                        return
                else:
                    self._turn(fd, events)
            self._send()

    def close(self) -> None:
        """Closes the host's connection, if there is one."""
        self._leave()

    def _turn(self, fd: int, events: int) -> None:
        if fd in self._sources:
            self._read(self._sources[fd])
        elif fd == self._handed.fileno():
            self._take_host()
        elif fd == self._host and events & ~select.POLLOUT:
            self._hear()

    def _finish(self) -> None:
        """Takes the last words of a guest that ends, and sends what the host reads at once."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        self._send()
        while time.monotonic() < deadline_s:
            ready = self._poll.poll(QUIET_MS)
            if not ready:
                break
            for fd, events in ready:
                self._turn(fd, events)
            self._send()
        self._leave()

    # From the guest.

    def _read(self, source: "Source") -> bool:
        """Takes records of a source; whether that was all. A source that fails is left alone from then on."""
        try:
            is_all = source.read(self._add)
        except OSError as error:
            self._poll.unregister(source.fd)
            del self._sources[source.fd]
            self._say(WARNING, f"a source of the log failed: {error.strerror}")
            return True
        if isinstance(source, KernelSource) and source.lost > self._told_lost:
            count, self._told_lost = source.lost - self._told_lost, source.lost
            self._say(WARNING, f"{count} records of the kernel were overwritten before they were read")
        return is_all

    def _drain(self, source: "Source") -> None:
        """Takes what waits; not for ever, since programs may write faster than this reads."""
        for _ in range(DRAIN_TURNS):
            if self._read(source):
                return

    def _add(self, source: int, flags: int, time_ns: int, writer: tuple[int, int, int], text: bytes) -> None:
        kept, (pid, uid, gid) = self._kept, writer
        kept.add(encode_header(len(text), source, flags, 0, kept.next, time_ns, pid, uid, gid) + text)

    def _say(self, priority: int, text: str) -> None:
        line = f"<{FACILITY_SYSLOG | priority}>vshd: {text}".encode("utf-8", "replace")
        self._add(COLLECTOR, 0, time.time_ns(), NOBODY, line)

    # To the host.

    def _take_host(self) -> None:
        """A connection of the host, which replaces the one before."""
        ancillary = _socket.CMSG_SPACE(12) + _socket.CMSG_SPACE(4)
        try:
            data, words, _, _ = self._handed.recvmsg(HANDED_MAX, ancillary)
        except OSError:
            return
        fds = [
            int.from_bytes(word[at : at + 4], sys.byteorder)
            for level, kind, word in words
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS
            for at in range(0, len(word), 4)
        ]
        users = [
            int.from_bytes(word[4:8], sys.byteorder)
            for level, kind, word in words
            if level == _socket.SOL_SOCKET and kind == SCM_CREDENTIALS
        ]
        if len(fds) != 1 or len(data) < HANDED_SIZE or users != [os.geteuid()]:
            for fd in fds:
                os.close(fd)
            return
        self._leave()
        self._host = fds[0]
        os.set_blocking(self._host, False)
        os.set_inheritable(self._host, False)
        is_known = data[:ID_SIZE] == self._id
        wanted = int.from_bytes(data[ID_SIZE:HANDED_SIZE], "little") if is_known else 0
        # What was never written cannot be waited for.
        self._next = min(max(wanted, self._kept.first), self._kept.next)
        self._out = encode_header(ID_SIZE, BEGIN, 0, 0, self._next, time.time_ns(), 0, 0, 0) + self._id
        self._poll.register(self._host, select.POLLIN)
        self._take_words(data[HANDED_SIZE:])

    def _hear(self) -> None:
        try:
            data = os.read(self._host, WORD_SIZE * MARKS_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take_words(data)
        else:
            self._leave()

    def _take_words(self, data: bytes) -> None:
        """Words of the host: the answer to each comes behind all that was written before it arrived."""
        data = self._held + data
        while len(data) >= WORD_SIZE:
            word, data = data[:WORD_SIZE], data[WORD_SIZE:]
            if len(self._marks) >= MARKS_MAX:
                self._leave()
                return
            for source in list(self._sources.values()):
                self._drain(source)
            self._marks.append((self._kept.next, int.from_bytes(word, "little")))
        self._held = data

    def _send(self) -> None:
        """Sends as much as the host's end takes at once."""
        while self._host >= 0:
            if not self._out:
                self._fill()
            if not self._out:
                self._poll.modify(self._host, select.POLLIN)
                return
            try:
                self._out = self._out[os.write(self._host, self._out) :]
            except BlockingIOError:
                self._poll.modify(self._host, select.POLLIN | select.POLLOUT)
                return
            except OSError:
                self._leave()

    def _fill(self) -> None:
        """Encodes what comes next."""
        until = self._marks[0][0] if self._marks else self._kept.next
        if self._next < until:
            self._out, self._next = self._kept.take(self._next, SEND_SIZE)
        while self._marks and self._marks[0][0] <= self._next:
            _, word = self._marks.pop(0)
            self._out += encode_header(0, MARK, 0, 0, word, time.time_ns(), 0, 0, 0)

    def _leave(self) -> None:
        if self._host >= 0:
            self._poll.unregister(self._host)
            os.close(self._host)
        self._host = -1
        self._out = self._held = b""
        self._marks = []


def open_kernel_log(path: str = "/dev/kmsg") -> KernelSource | None:
    """The kernel's log; None where it cannot be read."""
    try:
        return KernelSource(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return None
