"""Carries messages between a guest's connection and the server of a folder: one loop, until either side ends."""

import os
import select
import time
from collections.abc import Callable
from typing import Protocol

from vmkit.shares.cutter import Cutter, MountFailedError, ProtocolError
from vmkit.shares.folder import DATA_MAX
from vsh.transport import remaining_ms

# No more is read from a guest that does not take its answers.
WAITING_MAX = 2 * (DATA_MAX + 4096)
# Of one writev(2): fewer than IOV_MAX, 1024.
PIECES_MAX = 64
# From the answer of the guest's vshd until it has mounted the folder. A guest under emulation may be busy.
MOUNT_TIMEOUT_S = 30.0
# After so long the loop looks at the signals, the deadline and the connection, whatever the guest asks for meanwhile.
TURN_S = 0.1


class Speaker(Protocol):
    """One protocol of shares."""

    @property
    def messages(self) -> Cutter:
        """Cuts what the guest sends."""

    @property
    def is_mounted(self) -> bool:
        """Whether the guest has the folder."""

    def answer(self, message: memoryview) -> bytes:
        """The answer to one message; empty where it has none. Raises ProtocolError."""

    def close(self) -> None:
        """Closes all that the guest has open."""


class ShareService:
    """One share. Invariant: `_waiting` is what the guest has not taken yet, `waiting_bytes` in all."""

    def __init__(self, fd: int, speaker: Speaker) -> None:
        """fd: the connection, non-blocking, which stays the caller's."""
        self._fd = fd
        self._speaker = speaker
        self._waiting: list[memoryview] = []
        self.waiting_bytes = 0

    def run(
        self, rest: bytes, stop: int, is_stopped: Callable[[], bool], show: Callable[[], None] = lambda: None
    ) -> str:
        """Serves until the connection ends, or `stop` is readable and is_stopped() says so. Returns why it ended.

        rest: what was read from the connection before. show: is called once, when the guest has the folder.
        """
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        deadline_s: float | None = time.monotonic() + MOUNT_TIMEOUT_S
        try:
            self._take(rest)
            while True:
                is_more = self._work()
                if deadline_s is not None and self._speaker.is_mounted:
                    deadline_s = None
                    show()
                poll.register(self._fd, self._find_interest(is_more=is_more))
                if deadline_s is not None and not remaining_ms(deadline_s):
                    return f"it took longer than {MOUNT_TIMEOUT_S:g} s"
                wait_ms = None if deadline_s is None else remaining_ms(deadline_s)
                for fd, events in poll.poll(0 if is_more else wait_ms):
                    if fd == stop and is_stopped():
                        return "it was ended"
                    # poll() reports an end as well, also while no request is read.
                    if fd == self._fd and events & ~select.POLLOUT and (is_more or not self._receive()):
                        return "the guest ended it"
        except MountFailedError as error:
            return f"mount(2) failed there: {error}"
        except ProtocolError as error:
            return f"the guest broke the protocol: {error}"
        except OSError as error:
            return f"the connection is gone: {error.strerror}"
        finally:
            self._speaker.close()

    def _find_interest(self, *, is_more: bool) -> int:
        """is_more: whole messages wait in the buffer, which may have no room for others."""
        interest = select.POLLOUT if self._waiting else 0
        return interest | (select.POLLIN if self.waiting_bytes < WAITING_MAX and not is_more else 0)

    def _receive(self) -> bool:
        """False at the connection's end. Raises OSError, ProtocolError."""
        if self.waiting_bytes >= WAITING_MAX:
            # Whatever is waited for, poll() reports an end as well.
            return False
        try:
            size = os.readv(self._fd, [self._speaker.messages.find_room()])
        except BlockingIOError:
            return True
        self._speaker.messages.received(size)
        return size > 0

    def _take(self, data: bytes) -> None:
        room = self._speaker.messages.find_room()
        room[: len(data)] = data
        self._speaker.messages.received(len(data))

    def _work(self) -> bool:
        """Answers whole messages for one turn, as far as the guest takes the answers. True: more of them may wait.

        Raises OSError, ProtocolError.
        """
        turn_end_s = time.monotonic() + TURN_S
        while True:
            message = self._speaker.messages.take() if self.waiting_bytes < WAITING_MAX else None
            if message is not None:
                self._answer(message)
                if time.monotonic() < turn_end_s:
                    continue
                self._send()
                return True
            before = self.waiting_bytes
            self._send()
            if before < WAITING_MAX or self.waiting_bytes >= WAITING_MAX:
                return False

    def _answer(self, message: memoryview) -> None:
        answer = self._speaker.answer(message)
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
