"""Connections being opened, each in a thread of its own: what they wait for does not hold up the loop.

Owns the threads and the way back into the loop. What a thread does is the caller's; what comes of it is handled in the
loop's thread alone.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from vsh.errors import VshError

# Openings to one place at once; those that come later wait for their turn. A guest is not faster with more of them at
# once, and each is a process there. Other places are not held up by one that is slow.
AT_ONCE_MAX = 16
WAKE_SIZE = 512

T = TypeVar("T")


class Openings:
    """Invariant: `count` openings wait, are under way, or have finished and are not handled yet. Those that wait are in
    `_waiting` by their place, and only while `_running` says that AT_ONCE_MAX others to that place are not handled.
    """

    def __init__(self) -> None:
        self.fd, self._waking = os.pipe()
        for fd in (self.fd, self._waking):
            os.set_blocking(fd, False)
        self._finished: deque[tuple[str, Callable[[], None]]] = deque()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._running: dict[str, int] = {}
        self.count = 0

    def start(
        self, place: str, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[VshError], None]
    ) -> None:
        """Does `work` in a thread when its turn comes; then `done` or `failed` in the loop's. place: where it goes."""
        self.count += 1

        def run() -> None:
            try:
                result = work()
            except VshError as error:
                self._finish(place, lambda error=error: failed(error))  # type: ignore[misc]  # mypy cannot infer a default
            except Exception as error:
                # Nothing may get lost with its thread; OSError is the likely one.
                failure = VshError(f"{type(error).__name__}: {error}")
                self._finish(place, lambda: failed(failure))
            else:
                self._finish(place, lambda: done(result))

        def start() -> None:
            try:
                threading.Thread(target=run, daemon=True).start()
            except RuntimeError as error:
                failure = VshError(f"cannot start a thread: {error}")
                self._finish(place, lambda: failed(failure))

        if self._running.get(place, 0) < AT_ONCE_MAX:
            self._running[place] = self._running.get(place, 0) + 1
            start()
        else:
            self._waiting.setdefault(place, deque()).append(start)

    def serve(self) -> None:
        """In the loop, when `fd` can be read: handles what has finished."""
        try:
            os.read(self.fd, WAKE_SIZE)
        except BlockingIOError:
            pass
        while self._finished:
            place, handle = self._finished.popleft()
            self.count -= 1
            self._start_next(place)
            handle()

    def _start_next(self, place: str) -> None:
        """One to this place has finished: the next takes its turn."""
        waiting = self._waiting.get(place)
        if waiting:
            waiting.popleft()()
            return
        self._waiting.pop(place, None)
        self._running[place] -= 1
        if not self._running[place]:
            del self._running[place]

    def _finish(self, place: str, handle: Callable[[], None]) -> None:
        self._finished.append((place, handle))
        try:
            os.write(self._waking, b"x")
        except OSError:
            # Full: it wakes anyway.
            pass
