"""Slows the bytes of one connection down: a socket that takes and gives only what its brakes allow.

It stands in the place of the host program's socket (link.py), so that a device without faults has no code for them in
its way. Bytes that wait on their way to the guest stay in the kernel's buffer; bytes that wait on their way to the
program stay in the link's outbox. Both have their ceilings already.
"""

import fcntl
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from vmkit.vsock.buffers import trim_pieces
from vmkit.vsock.requests import DIRECTIONS, TO_GUEST, TO_HOST

# A rate is granted in portions of so many seconds' worth.
PORTION_S: Final = 0.02
# asm-generic/ioctls.h: how many bytes can be read.
FIONREAD: Final = 0x541B
# Bytes that came together wait together. Beyond so many groups the newest takes what comes.
MAX_GROUPS: Final = 1024


class Brake(Protocol):
    """Decides how many bytes of one direction may pass. `arrived` and `passed` count the bytes since it was made."""

    def grant(self, arrived: int, passed: int, now_s: float) -> int:
        """How many further bytes may pass now, of those that have arrived."""

    def spend(self, count: int) -> None:
        """Notes that so many bytes passed."""

    def next_s(self) -> float | None:
        """When more bytes may pass; None: nothing waits for a time."""

    def wake(self, now_s: float) -> None:
        """Notes that the wait is over: the bytes that may pass by now will be tried."""


class Delay:
    """Lets each byte pass a fixed time after it arrived. `start`: how many had passed before."""

    def __init__(self, delay_s: float, start: int) -> None:
        self._delay_s = delay_s
        self._groups: deque[tuple[float, int]] = deque()
        self._seen = self._open = start
        self._woken_s = 0.0

    def grant(self, arrived: int, passed: int, now_s: float) -> int:
        if arrived > self._seen:
            self._seen = arrived
            if len(self._groups) == MAX_GROUPS:
                self._groups.pop()
            self._groups.append((now_s + self._delay_s, arrived))
        while self._groups and self._groups[0][0] <= now_s:
            self._open = self._groups.popleft()[1]
        return max(0, self._open - passed)

    def spend(self, count: int) -> None:
        pass

    def next_s(self) -> float | None:
        return next((due_s for due_s, _ in self._groups if due_s > self._woken_s), None)

    def wake(self, now_s: float) -> None:
        self._woken_s = now_s


class Rate:
    """Lets so many bytes a second pass, in small portions."""

    def __init__(self, bytes_s: int, now_s: float) -> None:
        self._bytes_s = bytes_s
        self._portion = max(1, int(bytes_s * PORTION_S))
        self._room = float(self._portion)
        self._filled_s = now_s
        self._is_hungry = False

    def grant(self, arrived: int, passed: int, now_s: float) -> int:
        self._room = min(float(self._portion), self._room + (now_s - self._filled_s) * self._bytes_s)
        self._filled_s = now_s
        # A whole portion or nothing: single bytes would cost a packet each.
        granted = int(self._room) if int(self._room) >= min(self._portion, arrived - passed) else 0
        self._is_hungry = granted < arrived - passed
        return granted

    def spend(self, count: int) -> None:
        self._room -= count

    def next_s(self) -> float | None:
        if not self._is_hungry:
            return None
        return self._filled_s + max(0.001, (self._portion - self._room) / self._bytes_s)

    def wake(self, now_s: float) -> None:
        self._is_hungry = False


class Fuse:
    """Lets so many bytes pass in total, and then calls `burn` at the next turn. `burn` removes it or the connection."""

    def __init__(self, count: int, burn: Callable[[], None]) -> None:
        self._left = count
        self._burn = burn
        self._is_burnt = False

    def grant(self, arrived: int, passed: int, now_s: float) -> int:
        return self._left

    def spend(self, count: int) -> None:
        self._left -= count

    def next_s(self) -> float | None:
        return 0.0 if self._left <= 0 and not self._is_burnt else None

    def wake(self, now_s: float) -> None:
        if self._left <= 0 and not self._is_burnt:
            self._is_burnt = True
            self._burn()


class BrakedSocket(socket.socket):
    """A host program's socket with brakes: the same descriptor, in the place of the object that had it."""

    def __init__(self, sock: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, 0, sock.detach())
        self.setblocking(False)
        self._clock = clock
        self.passed = dict.fromkeys(DIRECTIONS, 0)
        # By the number of the fault.
        self.brakes: dict[str, dict[int, Brake]] = {direction: {} for direction in DIRECTIONS}

    def release(self) -> socket.socket:
        """The plain socket again. This object has no descriptor any more."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, self.detach())
        sock.setblocking(False)
        return sock

    def all_brakes(self) -> list[Brake]:
        """The brakes of both directions. A copy: a fuse may remove one."""
        return [brake for direction in DIRECTIONS for brake in self.brakes[direction].values()]

    def remove(self, number: int) -> None:
        """Takes out the brakes of a fault."""
        for direction in DIRECTIONS:
            self.brakes[direction].pop(number, None)

    def next_s(self) -> float | None:
        """When the link has to be tried again; None: it waits for nothing of ours."""
        return min((due_s for brake in self.all_brakes() if (due_s := brake.next_s()) is not None), default=None)

    def note_pending(self, count: int) -> None:
        """Notes bytes of the guest that wait in the link: their delay runs from now."""
        self._grant(TO_HOST, count)

    def _grant(self, direction: str, pending: int) -> int:
        passed, now_s = self.passed[direction], self._clock()
        room = pending
        for brake in self.brakes[direction].values():
            room = min(room, brake.grant(passed + pending, passed, now_s))
        return room

    def _spend(self, direction: str, count: int) -> None:
        self.passed[direction] += count
        for brake in self.brakes[direction].values():
            brake.spend(count)

    def _count_readable(self) -> int:
        return int.from_bytes(fcntl.ioctl(self.fileno(), FIONREAD, bytes(4)), "little")

    # The calls that link.py makes.

    def recvmsg_into(self, buffers: Any, *options: int) -> Any:
        if not self.brakes[TO_GUEST]:
            return super().recvmsg_into(buffers, *options)
        pending = self._count_readable()
        if not pending:
            # The end, or nothing yet. A byte that comes just now has an event of its own.
            if self.recv(1, socket.MSG_PEEK):
                raise BlockingIOError
            return 0, [], 0, None
        room = self._grant(TO_GUEST, pending)
        if room <= 0:
            raise BlockingIOError
        total = sum(map(len, buffers))
        done = super().recvmsg_into(trim_pieces(buffers, total, min(room, total)), *options)
        self._spend(TO_GUEST, done[0])
        return done

    def send(self, data: Any, flags: int = 0) -> int:
        return self._send_pieces([memoryview(data)], flags)

    def sendmsg(self, buffers: Any, _ancillary: Any = (), flags: int = 0, _address: Any = None) -> int:
        return self._send_pieces(list(buffers), flags)

    def _send_pieces(self, pieces: list[memoryview], flags: int) -> int:
        total = sum(map(len, pieces))
        room = min(total, self._grant(TO_HOST, total))
        if room <= 0:
            raise BlockingIOError
        sent = super().sendmsg(trim_pieces(pieces, total, room), (), flags)
        self._spend(TO_HOST, sent)
        return sent
