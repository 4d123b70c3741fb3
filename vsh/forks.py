"""Keeps a forked child from holding what belongs to its parent: connections of sessions, and the pipes of processes.

A child made by os.fork(), as multiprocessing's workers are, has a copy of each descriptor. With the copies a command
would live on when its client is gone, and would never see the end of its stdin. Owns the list of objects to let go.
Programs that only run a command make no children, and so do not import this module.
"""

import os
from typing import Protocol
from weakref import WeakSet

from vsh.session import Session


class HeldObject(Protocol):
    """An object that a child must not keep."""

    def let_go(self) -> None:
        """Closes this process's descriptors, and sends nothing to the other side."""


_held: "WeakSet[HeldObject]" = WeakSet()


def hold(thing: HeldObject) -> None:
    """Makes later children let go of `thing`, for as long as the object lives."""
    _held.add(thing)


def _let_go_of_all() -> None:
    for thing in list(_held):
        thing.let_go()


Session.on_open = staticmethod(hold)
os.register_at_fork(after_in_child=_let_go_of_all)
