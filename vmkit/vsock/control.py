"""The control socket: programs that trace the packets and bring about faults. Requests and answers are requests.py's.

It owns the sockets of these programs, and the buffers of those that follow. Nothing here waits for a program: one that
reads too slowly misses packets, and one that never reads costs a buffer with a ceiling.
"""

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Final

from vmkit.vsock.interference import Interference
from vmkit.vsock.muxer import Notice
from vmkit.vsock.requests import (
    MAX_LINE_BYTES,
    Clear,
    Fault,
    Kill,
    ListFaults,
    ReadRecent,
    RequestError,
    TraceRequest,
    parse_request,
    render_answer,
    render_error,
    render_request,
)
from vmkit.vsock.tap import Follower, Recent, Tap, encode_recent

MAX_CLIENTS: Final = 16
MAX_FOLLOWERS: Final = 4
# A program that asks and does not read the answers.
MAX_ANSWER_BYTES: Final = 64 * 1024
# The exit status after the request `kill`: EX_TEMPFAIL, sysexits.h.
KILLED_STATUS: Final = 75

_READ: Final = select.EPOLLIN | select.EPOLLRDHUP


class _Client:
    """One program at the control socket."""

    __slots__ = ("answers", "follower", "is_watching_writes", "line", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.line = bytearray()
        self.answers = bytearray()
        self.follower: Follower | None = None
        self.is_watching_writes = False

    def has_more(self) -> bool:
        """Whether bytes wait that the socket did not take."""
        return bool(self.answers) or (self.follower is not None and bool(self.follower.buffer))


class ControlDoor:
    """The control socket and its programs. Invariant: a program's socket is in `_clients` and in the epoll set."""

    def __init__(
        self,
        epoll: select.epoll,
        listener: socket.socket,
        interference: Interference,
        set_tap: Callable[[Tap | None], None],
        recent: Recent,
        notice: Notice,
    ) -> None:
        """set_tap: gets the tap while some program follows, and None while none does. recent: the traffic's."""
        self._epoll = epoll
        self._listener = listener
        self._interference = interference
        self._set_tap = set_tap
        self._recent = recent
        self._notice = notice
        self._clients: dict[int, _Client] = {}
        self._tap = Tap()
        listener.setblocking(False)
        epoll.register(listener, select.EPOLLIN)

    def handle(self, fd: int, mask: int) -> bool:
        """Takes an epoll event for a descriptor of ours; False for another one."""
        client = self._clients.get(fd)
        if client is not None:
            if mask & ~select.EPOLLOUT and not self._read(client):
                self._drop(client)
            else:
                self._write(client)
        elif fd == self._listener.fileno():
            self._accept()
        else:
            return False
        return True

    def flush(self) -> None:
        """Gives the programs that follow what this turn has brought."""
        if self._tap.followers:
            for client in list(self._clients.values()):
                if client.follower is not None:
                    self._write(client)

    def close(self) -> None:
        """Closes all sockets."""
        self.flush()
        for client in list(self._clients.values()):
            self._drop(client)
        self._epoll.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock)
        self._epoll.register(sock, _READ)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        self._epoll.unregister(client.sock)
        client.sock.close()
        if client.follower is not None:
            self._tap.followers.remove(client.follower)
            self._update_tap()

    def _update_tap(self) -> None:
        self._set_tap(self._tap if self._tap.followers else None)

    def _read(self, client: _Client) -> bool:
        """Takes what a program sends; False when it has gone, or must go."""
        try:
            data = client.sock.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data or client.follower is not None:
            return False
        client.line += data
        while (end := client.line.find(b"\n")) >= 0:
            line = bytes(client.line[:end])
            del client.line[: end + 1]
            client.answers += self._answer(client, line)
        return len(client.line) < MAX_LINE_BYTES and len(client.answers) < MAX_ANSWER_BYTES

    def _write(self, client: _Client) -> None:
        follower = client.follower
        try:
            while client.answers:
                del client.answers[: client.sock.send(client.answers, socket.MSG_NOSIGNAL)]
            if follower is not None:
                while follower.buffer:
                    del follower.buffer[: client.sock.send(follower.buffer, socket.MSG_NOSIGNAL)]
                    follower.report_gap()
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client.has_more() != client.is_watching_writes:
            client.is_watching_writes = not client.is_watching_writes
            self._epoll.modify(client.sock, _READ | (select.EPOLLOUT if client.is_watching_writes else 0))

    def _answer(self, client: _Client, line: bytes) -> bytes:
        try:
            return render_answer(self._obey(client, line))
        except RequestError as error:
            return render_error(str(error))

    def _obey(self, client: _Client, line: bytes) -> list[bytes]:
        """Carries out a request; returns the lines of the answer. Raises RequestError."""
        request = parse_request(line)
        match request:
            case TraceRequest():
                if len(self._tap.followers) >= MAX_FOLLOWERS:
                    raise RequestError(f"{MAX_FOLLOWERS} programs follow this device already")
                client.follower = Follower(request)
                self._tap.followers.append(client.follower)
                self._update_tap()
                self._notice("trace", "a program follows the packets")
            case ReadRecent():
                return [record.hex().encode() + b"\n" for record in encode_recent(self._recent)]
            case Fault():
                fault = self._interference.add(request)
                self._tell(line)
                return [render_request(fault)]
            case ListFaults():
                return [render_request(fault) for fault in self._interference.list_faults()]
            case Clear():
                count = self._interference.clear(request.number)
                self._tell(line)
                return [b"cleared %d\n" % count]
            case Kill():
                self._tell(line)
                with contextlib.suppress(OSError):
                    client.sock.send(render_answer([]), socket.MSG_NOSIGNAL)
                os._exit(KILLED_STATUS)
        return []

    def _tell(self, line: bytes) -> None:
        self._notice("fault", f"a program asked for: {line.decode(errors='backslashreplace').strip()}")
