"""Keeps a forked child from holding what belongs to its parent: connections of sessions, and the pipes of processes.

A child made by os.fork(), as multiprocessing's workers are, has a copy of each descriptor. With the copies a command
would live on when its client is gone, and would never see the end of its stdin. Owns the list of what to let go. The
programs that only run a command do not import this: they make no children.
"""

import os
from typing import Protocol
from weakref import WeakSet

from vsh.session import Session


class Held(Protocol):
    """What a child must not have."""

    def let_go(self) -> None:
        """Closes this process's descriptors, and says nothing to the other side."""


_held: "WeakSet[Held]" = WeakSet()


def hold(thing: Held) -> None:
    """Has a later child let go of it, for as long as the object lives."""
    _held.add(thing)


def _let_go_of_all() -> None:
    for thing in list(_held):
        thing.let_go()


Session.on_open = staticmethod(hold)
os.register_at_fork(after_in_child=_let_go_of_all)
