"""Connections being opened, each in a thread of its own: what they wait for holds up nobody else.

Owns the threads and the way back into the loop. What a thread does is the caller's; what comes of it is handled in the
loop's thread alone.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from vsh.errors import VshError

# Openings at once; who comes later waits in the listener's backlog.
THREADS_MAX = 64
WAKE_SIZE = 512

T = TypeVar("T")


class Openings:
    """Invariant: `count` openings are under way, or finished and not handled yet."""

    def __init__(self) -> None:
        self.fd, self._waking = os.pipe()
        for fd in (self.fd, self._waking):
            os.set_blocking(fd, False)
        self._finished: deque[Callable[[], None]] = deque()
        self.count = 0

    @property
    def is_full(self) -> bool:
        return self.count >= THREADS_MAX

    def start(self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[VshError], None]) -> None:
        """Does `work` in a thread; then `done` or `failed` in the loop's."""
        self.count += 1

        def run() -> None:
            try:
                result = work()
            except VshError as error:
                self._finish(lambda error=error: failed(error))  # type: ignore[misc]
            except Exception as error:
                # Nothing may get lost with its thread; OSError is the likely one.
                failure = VshError(f"{type(error).__name__}: {error}")
                self._finish(lambda: failed(failure))
            else:
                self._finish(lambda: done(result))

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:
            self._finish(lambda error=error: failed(VshError(f"cannot start a thread: {error}")))  # type: ignore[misc]

    def serve(self) -> None:
        """In the loop, when `fd` can be read: handles what has finished."""
        try:
            os.read(self.fd, WAKE_SIZE)
        except BlockingIOError:
            pass
        while self._finished:
            self.count -= 1
            self._finished.popleft()()

    def _finish(self, handle: Callable[[], None]) -> None:
        self._finished.append(handle)
        try:
            os.write(self._waking, b"x")
        except OSError:
            # Full: it wakes anyway.
            pass
