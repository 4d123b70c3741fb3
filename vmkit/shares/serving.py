"""Carries FUSE messages between a guest's connection and the server of a folder: one loop, until either side ends."""

import os
import select
from collections.abc import Callable

from vmkit.shares.fuse import MESSAGE_MAX, Messages, ProtocolError, Wire
from vmkit.shares.server import FolderServer

# No more is read from a guest that does not take its answers.
WAITING_MAX = 2 * MESSAGE_MAX
# Of one writev(2): fewer than IOV_MAX, 1024.
PIECES_MAX = 64


class ShareService:
    """One share. Invariant: `_waiting` is what the guest has not taken yet, `waiting_bytes` in all."""

    def __init__(self, fd: int, folder: int, *, is_read_only: bool) -> None:
        """fd: the connection, non-blocking; folder: an open directory. Both stay the caller's."""
        self._fd = fd
        self._folder = folder
        self._is_read_only = is_read_only
        self._messages = Messages()
        self._server: FolderServer | None = None
        self._waiting: list[memoryview] = []
        self.waiting_bytes = 0

    def run(self, rest: bytes, stop: int, is_stopped: Callable[[], bool]) -> str:
        """Serves until the connection ends, or `stop` is readable and is_stopped() says so. Returns why it ended.

        rest: what was read from the connection before.
        """
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        try:
            self._take(rest)
            while True:
                self._work()
                poll.register(self._fd, self._find_interest())
                for fd, events in poll.poll():
                    if fd == stop and is_stopped():
                        return "it was ended"
                    if fd == self._fd and events & ~select.POLLOUT and not self._receive():
                        return "the guest ended it"
        except ProtocolError as error:
            return f"the guest broke the protocol: {error}"
        except OSError as error:
            return f"the connection is gone: {error.strerror}"
        finally:
            if self._server is not None:
                self._server.close()

    def _find_interest(self) -> int:
        interest = select.POLLOUT if self._waiting else 0
        return interest | (select.POLLIN if self.waiting_bytes < WAITING_MAX else 0)

    def _receive(self) -> bool:
        """False at the connection's end. Raises OSError, ProtocolError."""
        if self.waiting_bytes >= WAITING_MAX:
            # Whatever is waited for, poll() reports an end as well.
            return False
        try:
            size = os.readv(self._fd, [self._messages.find_room()])
        except BlockingIOError:
            return True
        self._messages.received(size)
        return size > 0

    def _take(self, data: bytes) -> None:
        room = self._messages.find_room()
        room[: len(data)] = data
        self._messages.received(len(data))

    def _work(self) -> None:
        """Answers all whole messages, as far as the guest takes the answers. Raises OSError, ProtocolError."""
        while True:
            message = self._messages.take() if self.waiting_bytes < WAITING_MAX else None
            if message is not None:
                self._answer(message)
                continue
            before = self.waiting_bytes
            self._send()
            if before < WAITING_MAX or self.waiting_bytes >= WAITING_MAX:
                return

    def _answer(self, message: memoryview) -> None:
        if self._server is None:
            self._server = FolderServer(self._folder, Wire(self._messages.order), is_read_only=self._is_read_only)
        answer = self._server.answer(message)
        if answer:
            self._waiting.append(memoryview(answer))
            self.waiting_bytes += len(answer)

    def _send(self) -> None:
        """Sends what the connection takes. Raises OSError."""
        while self._waiting:
            try:
                taken = os.writev(self._fd, self._waiting[:PIECES_MAX])
            except BlockingIOError:
                return
            self.waiting_bytes -= taken
            while self._waiting and taken >= len(self._waiting[0]):
                taken -= len(self._waiting.pop(0))
            if taken:
                self._waiting[0] = self._waiting[0][taken:]
