"""A collector of a guest's log in a thread, with the sockets that pid 1 would give it, and a host that asks for it."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.vsh.live import DEADLINE_S
from vshd.carry.records import BEGIN, MARK, WORD_SIZE, LogReader, LogRecord
from vshd.flags import Options
from vshd.log import Log
from vshd.services.logs import open_service
from vshd.services.table import Surroundings
from vshd.signals import Wakeup
from vshd.syslog.collecting import Collector
from vshd.syslog.kept import KeptRecords
from vshd.syslog.sockets import open_handed, open_log_socket
from vshd.syslog.sources import KernelSource, SocketSource
from vshd.wire.requests import Logs


class Host:
    """The host's end of a connection to the log."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = LogReader()
        self._waiting: list[LogRecord] = []
        self.begin = self.receive()
        assert self.begin.source == BEGIN

    def receive(self) -> LogRecord:
        while not self._waiting:
            data = self.sock.recv(65536)
            assert data, "the collector closed the connection"
            self._waiting = self._reader.feed(data)
        return self._waiting.pop(0)

    def read(self, word: int = 7) -> list[LogRecord]:
        """All that was logged until now."""
        self.sock.sendall(word.to_bytes(WORD_SIZE, "little"))
        records = []
        while (record := self.receive()).source != MARK:
            records.append(record)
        assert record.number == word
        return records

    def read_to_end(self) -> list[LogRecord]:
        while data := self.sock.recv(65536):
            self._waiting += self._reader.feed(data)
        return self._waiting

    @property
    def collector(self) -> bytes:
        return self.begin.text


class Collecting:
    """A running collector. `log` is the path for programs, `kernel` writes records of /dev/kmsg."""

    def __init__(self, folder: Path, kept: KeptRecords) -> None:
        self.wakeup = Wakeup((signal.SIGTERM,))
        self.log = folder / "log"
        self.handed = folder / "handed"
        self.kernel, kmsg = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        kmsg.setblocking(False)
        self._log_socket, self._handed_socket = open_log_socket(str(self.log)), open_handed(str(self.handed))
        self._kmsg = KernelSource(kmsg.detach())
        sources: list[SocketSource | KernelSource] = [SocketSource(self._log_socket), self._kmsg]
        self.collector = Collector(sources, self._handed_socket, kept)
        self.around = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)
        self.around.options.logs = str(self.handed)

    def write(self, *lines: bytes) -> None:
        """Lines of one program, in this order."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as program:
            program.settimeout(DEADLINE_S)
            program.connect(str(self.log))
            for line in lines:
                program.send(line)

    @contextlib.contextmanager
    def connect(self, collector: bytes = b"", next_: int = 0) -> Iterator[Host]:
        """As vshd does it: the service has the descriptor handed on."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(DEADLINE_S)
            service = open_service(Logs(collector=collector, next_=next_), theirs.fileno(), self.around)
            end = service.run(theirs.detach(), b"", self.wakeup, Log())
            assert end == "the collector has the connection"
            yield Host(ours)

    def close(self) -> None:
        self.collector.close()
        self.wakeup.close()
        os.close(self._kmsg.fd)
        for sock in (self.kernel, self._log_socket, self._handed_socket):
            sock.close()


@contextlib.contextmanager
def collecting(
    size_max: int = 1 << 20, before: Callable[[Collecting], None] = lambda _guest: None
) -> Iterator[Collecting]:
    """Until the block ends. Its folder is open to every user, as /dev is. before: runs while there is no thread yet."""
    with tempfile.TemporaryDirectory(prefix="vsh-log-") as folder:
        Path(folder).chmod(0o755)
        running = Collecting(Path(folder), KeptRecords(size_max))
        before(running)
        thread = threading.Thread(target=running.collector.run, args=(running.wakeup,))
        thread.start()
        try:
            yield running
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            thread.join(DEADLINE_S)
            is_over = not thread.is_alive()
            running.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            assert is_over
