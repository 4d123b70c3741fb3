"""The trunk of a forward: the one session that its connections in the guest share (docs/reference/protocol.md 3.4).

For threads: all here blocks, with deadlines. What a thread opens, vsh.forward.branches uses in its loop.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import Busy, ExecError, Unanswered, Unreachable, VshError
from vsh.forward.guest import connect_guest, with_port
from vsh.session import open_raw
from vsh.transport import open_transport, remaining_ms
from vshd.wire import messages
from vshd.wire.branch import SECRET_SIZE, TOKEN_SIZE, ClientBranch
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.requests import Forward

# A vshd that knows no branches is asked again after this time: the machine may be another one by then.
REFUSED_S = 60.0


class Trunk:
    """One session in the guest that serves branches. Its end of the connection, `control`, is the loop's to close.

    users: the loop's own count of the branches that have a client.
    """

    __slots__ = ("control", "token", "users", "where")

    def __init__(self, control: int, where: Address, token: bytes) -> None:
        """where: its listener. token: what its branches prove to each other."""
        self.control = control
        self.where = where
        self.token = token
        self.users = 0


class Opened:
    """What the guest's side of a connection was opened as. trunk None: `fd` leads to the place, after `rest`; otherwise
    to a branch that waits for GO.
    """

    __slots__ = ("branch", "fd", "rest", "trunk")

    def __init__(
        self, fd: int, rest: bytes = b"", trunk: Trunk | None = None, branch: ClientBranch | None = None
    ) -> None:
        self.fd = fd
        self.rest = rest
        self.trunk = trunk
        self.branch = branch


class Dialer:
    """Opens branches of one forward, for many threads; and sessions of their own where the guest has no branches.

    Invariant: `_trunk` is the one that new branches belong to. Every trunk is given to the loop once, by take_new().
    """

    def __init__(self, find_address: Callable[[], Address], target: str, user: str) -> None:
        self._find_address = find_address
        self._target = target
        self._user = user
        # One thread opens a trunk, and the others wait for it. The loop takes only the second lock, which is held
        # for an instant.
        self._opening = threading.Lock()
        self._swap = threading.Lock()
        self._trunk: Trunk | None = None
        self._new: deque[Trunk] = deque()
        self._refused_until_s = 0.0
        # The last failure to open a trunk, and when: those that waited for it meanwhile have failed as well.
        self._failure: tuple[float, VshError] | None = None

    def open(self, timeout_s: float) -> Opened:
        """Opens the guest's side of one more connection. Raises VshError."""
        vm = self._find_address()
        for _ in range(2):
            trunk = self._find_trunk(vm, timeout_s)
            if trunk is None:
                break
            try:
                return open_branch(trunk, timeout_s)
            except (Busy, Unanswered):
                raise
            except Unreachable:
                # It has ended, and the guest may well serve another one.
                self.forget(trunk)
        else:
            self._refused_until_s = time.monotonic() + REFUSED_S
        fd, rest = connect_guest(vm, self._target, user=self._user, timeout_s=timeout_s)
        return Opened(fd, rest)

    def open_ahead(self, timeout_s: float) -> Opened:
        """A branch for a client that has not come yet. Raises VshError, also when there is no trunk."""
        trunk = self._trunk
        if trunk is None:
            raise Unreachable("the forward has no session in the guest now")
        return open_branch(trunk, timeout_s)

    def take_new(self) -> list[Trunk]:
        """The trunks that were opened since the last call; the caller closes them."""
        new = []
        while self._new:
            new.append(self._new.popleft())
        return new

    def is_current(self, trunk: Trunk) -> bool:
        """Whether new branches will belong to it."""
        return self._trunk is trunk

    def forget(self, trunk: Trunk) -> None:
        """New branches get another trunk."""
        with self._swap:
            if self._trunk is trunk:
                self._trunk = None

    def _find_trunk(self, vm: Address, timeout_s: float) -> Trunk | None:
        """None where the guest serves no branches. Raises VshError."""
        asked_s = time.monotonic()
        with self._opening:
            trunk = self._trunk
            if trunk is not None:
                return trunk
            if self._refused_until_s > time.monotonic():
                return None
            if self._failure is not None and self._failure[0] > asked_s:
                raise self._failure[1]
            try:
                trunk = open_trunk(vm, self._target, self._user, timeout_s)
            except VshError as error:
                self._failure = (time.monotonic(), error)
                raise
            if trunk is None:
                self._refused_until_s = time.monotonic() + REFUSED_S
                return None
            with self._swap:
                self._trunk = trunk
            self._new.append(trunk)
            return trunk


def open_trunk(vm: Address, target: str, user: str, timeout_s: float) -> Trunk | None:
    """Has the guest's vshd serve branches to `target`. None: it serves none, or none that can be reached from here.

    Raises VshError.
    """
    if vm.kind not in (kinds.UNIX, kinds.HYBRID, kinds.VSOCK):
        return None
    token = os.urandom(TOKEN_SIZE)
    request = Forward(branches=os.fsencode(target), token=token, user=os.fsencode(user))
    try:
        control, _, description = open_raw(vm, request, timeout_s=timeout_s)
    except ExecError as error:
        if error.kind == messages.BAD_REQUEST:
            return None
        raise
    where = _find_listener(vm, description)
    if where is None:
        os.close(control)
        return None
    return Trunk(control, where, token)


def _find_listener(vm: Address, description: str) -> Address | None:
    """Where branches connect to. Of a machine only its vsock ports can be meant, and never a place of this host."""
    kind, _, place = description.partition(":")
    if kind == "vsock" and vm.kind != kinds.UNIX and place.isascii() and place.isdigit():
        return with_port(vm, int(place)) if int(place) < kinds.UINT32_MAX else None
    if kind == "unix" and vm.kind == kinds.UNIX and place.startswith("@"):
        return Address(kinds.UNIX, name=vm.name, path="\0" + place[1:])
    return None


def open_branch(trunk: Trunk, timeout_s: float) -> Opened:
    """One more connection to a trunk's listener, whose both sides have proven themselves. Raises VshError."""
    deadline_s = time.monotonic() + timeout_s
    name = trunk.where.name
    fd = open_transport(trunk.where, deadline_s)
    branch = ClientBranch(trunk.token)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    left = SECRET_SIZE
    try:
        os.write(fd, branch.secret)
        while not branch.is_proven:
            if not poll.poll(remaining_ms(deadline_s)):
                raise Unanswered(
                    f"the forward's session in {name} does not answer", hint="the guest may be paused or stuck"
                )
            data = os.read(fd, left)
            if not data:
                raise Unreachable(f"the forward's session in {name} has ended")
            left -= len(data)
            branch.receive_proof(data)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, (OSError, RemoteProtocolError)):
            raise Unreachable(f"the forward's session in {name} cannot be reached: {error}") from error
        raise
    return Opened(fd, trunk=trunk, branch=branch)
