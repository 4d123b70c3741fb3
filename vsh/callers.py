"""Finds the expected peer among the connections that come to us.

Any program of a guest can connect to a port of its host. So each caller is a stranger until it has proven the token of
this one session (docs/reference/protocol.md 2.9 and 4). This module examines callers side by side: a stranger that
sends nothing, or connects again and again, does not keep the peer out. It owns the callers' descriptors. It knows
nothing of where they connect, and of the request to the peer.
"""

import os
import select

from vsh.errors import VshError
from vsh.listener import HostListener
from vshd.wire import state
from vshd.wire.client import ClientConnection
from vshd.wire.events import Broken, Distrusted, Event, Failed, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Callers at once. The oldest gives way to a new one: by then the peer has had the time of so many connections.
CALLERS_MAX = 256
ACCEPTS_AT_ONCE = 64
# Until the proof a peer sends less than two legacy frames.
RECEIVE_SIZE = 1 << 13


class Callers:
    """Invariant: `_open` are the callers that have proven nothing yet, oldest first, and nothing else is open."""

    def __init__(self, listener: HostListener, make_connection: "Callable[[], ClientConnection]") -> None:
        """make_connection: returns a new connection that has its setup to send, and demands the proof."""
        self.strangers = 0
        # Why the last caller was turned away, in words; empty before.
        self.reason = ""
        self._listener = listener
        self._make_connection = make_connection
        self._open: dict[int, ClientConnection] = {}
        self._poll = select.poll()
        self._poll.register(listener.socket.fileno(), select.POLLIN)
        listener.socket.setblocking(False)

    def watch(self, fd: int) -> None:
        """Makes wait() also return when this descriptor is readable."""
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_ms: int) -> list[int]:
        """Returns the descriptors with events, also those given to watch(); none at the deadline."""
        return [fd for fd, _ in self._poll.poll(timeout_ms)]

    def serve(self, fd: int) -> tuple[int, ClientConnection] | None:
        """Takes a descriptor's event. Returns the peer once it has proven itself; the request is still to be sent."""
        if fd == self._listener.socket.fileno():
            self._accept()
            return None
        connection = self._open.get(fd)
        if connection is None:
            return None
        self._advance(fd, connection)
        if fd not in self._open or connection.state != state.DEFERRED:
            return None
        self._forget(fd)
        return fd, connection

    def close(self) -> None:
        """Closes all callers."""
        for fd in list(self._open):
            self._forget(fd)
            os.close(fd)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                fd = self._listener.accept()
            except VshError as error:
                # Another guest's.
                self.strangers += 1
                self.reason = error.brief
                continue
            except OSError:
                return
            os.set_blocking(fd, False)
            if len(self._open) >= CALLERS_MAX:
                self._turn_away(next(iter(self._open)), "it said nothing for too long")
            connection = self._open[fd] = self._make_connection()
            self._poll.register(fd, select.POLLIN)
            self._flush(fd, connection)

    def _advance(self, fd: int, connection: ClientConnection) -> None:
        try:
            data = os.read(fd, RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        events = connection.receive_data(data) if data else connection.receive_end()
        if connection.is_finished:
            self._turn_away(fd, _find_reason(events))

    def _flush(self, fd: int, connection: ClientConnection) -> None:
        """Sends a connection's setup. It is small, so a transport that does not take it at once is no peer's."""
        data = connection.output.take()
        try:
            if os.write(fd, data) == len(data):
                return
        except OSError:
            pass
        self._turn_away(fd, "it took nothing")

    def _turn_away(self, fd: int, reason: str) -> None:
        self.strangers += 1
        self.reason = reason
        self._forget(fd)
        os.close(fd)

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._open[fd]


def _find_reason(events: list[Event]) -> str:
    for event in events:
        if isinstance(event, Distrusted | Broken):
            return event.reason
        if isinstance(event, Refused | Failed):
            return event.description
    return "it ended the session"
