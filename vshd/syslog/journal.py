"""The journal of a guest's systemd as a source of its log: it connects, and sends each record with what it knows."""

import _socket
import select
import time

from vshd.syslog.export import ExportReader, add_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.syslog.sources import Add

# One journal connects. Another comes when that has been started again, and the first may not be closed by then.
CONNECTIONS_MAX = 4
READ_SIZE = 1 << 16
# Reads of one connection before another source has its turn.
AT_ONCE = 4


class JournalSource:
    """A listening socket that only root can reach, and the connections to it. `fd` is readable when one of them is."""

    __slots__ = ("_connections", "_epoll", "_listening", "fd")

    def __init__(self, listening: _socket.socket) -> None:
        """listening: non-blocking; it stays the caller's."""
        self._listening = listening
        self._epoll = select.epoll()
        self._epoll.register(listening.fileno(), select.EPOLLIN)
        self._connections: dict[int, tuple[_socket.socket, ExportReader]] = {}
        self.fd = self._epoll.fileno()

    def read(self, add: "Add") -> bool:
        """Takes what waits, some pieces of each connection at most. Returns whether that was all. Raises OSError."""
        is_all = True
        for fd, _ in self._epoll.poll(0):
            if fd in self._connections:
                is_all &= self._read_one(fd, add)
            else:
                self._accept()
                is_all = False
        return is_all

    def close(self) -> None:
        """Closes the connections."""
        for fd in list(self._connections):
            self._leave(fd)
        self._epoll.close()

    def _accept(self) -> None:
        try:
            fd, _ = self._listening._accept()  # type: ignore[attr-defined]  # typeshed lacks it
        except BlockingIOError:
            return
        connection = _socket.socket(fileno=fd)
        connection.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._leave(next(iter(self._connections)))
        self._connections[fd] = (connection, ExportReader())
        self._epoll.register(fd, select.EPOLLIN)

    def _read_one(self, fd: int, add: "Add") -> bool:
        connection, reader = self._connections[fd]
        for _ in range(AT_ONCE):
            try:
                data = connection.recv(READ_SIZE)
            except BlockingIOError:
                return True
            except OSError:
                data = b""
            if not data:
                self._leave(fd)
                return True
            now_ns = time.time_ns()
            for fields in reader.feed(data):
                add_record(add, fields, now_ns)
        return False

    def _leave(self, fd: int) -> None:
        connection, _ = self._connections.pop(fd)
        self._epoll.unregister(fd)
        connection.close()
