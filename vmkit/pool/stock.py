"""The machines of a pool by what becomes of them, and who waits for one. Pure: no process, no clock.

A machine is made, waits, is promised to one client, and is then taken; or it ends, wherever it is.
"""

from collections import deque
from collections.abc import Callable

# A pool of more would be a mistake in a number.
SIZE_MAX = 64

Give = Callable[[str], None]


class Stock:
    """Invariant: a machine is in at most one of `waiting` and `promised`; clients wait only while none is waiting."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: deque[str] = deque()
        self.promised: set[str] = set()
        self.taken = 0
        self._clients: deque[Give] = deque()

    @property
    def missing(self) -> int:
        """How many more machines are to be made: for the pool's size, or for the clients that wait."""
        return max(self.size - len(self.waiting) - len(self.promised), len(self._clients))

    def add(self, name: str) -> None:
        """A machine is ready to be taken."""
        if self._clients:
            self._promise(name, self._clients.popleft())
        else:
            self.waiting.append(name)

    def ask(self, give: Give) -> None:
        """A client wants a machine: `give` gets its name, now or later."""
        if self.waiting:
            self._promise(self.waiting.popleft(), give)
        else:
            self._clients.append(give)

    def leave(self, give: Give) -> None:
        """A client that waits does so no more."""
        if give in self._clients:
            self._clients.remove(give)

    def settle(self, name: str) -> None:
        """A client has taken the machine that it was promised."""
        if name in self.promised:
            self.promised.remove(name)
            self.taken += 1

    def lose(self, name: str) -> None:
        """A machine has ended, or must not be given again."""
        self.promised.discard(name)
        if name in self.waiting:
            self.waiting.remove(name)

    def _promise(self, name: str, give: Give) -> None:
        self.promised.add(name)
        give(name)
