"""The clients of a forward whose connections in the guest share one session there: each gets a branch of its trunk.

In the loop's thread. A client's way: a branch is taken, or opened in a thread; GO is sent, with what the client has
sent already; the guest's response makes a pair of the two. While clients come, branches are opened ahead of them.
"""

import os
import time
from collections.abc import Callable

from vsh.errors import ExecError, Unanswered, VshError
from vsh.forward.clients import ClientLeft, is_open
from vsh.forward.openings import Openings
from vsh.forward.patience import Patience, is_full
from vsh.forward.trunk import Dialer, Opened, Trunk
from vshd.carry.bridge import Pairs, Side
from vshd.wire import messages
from vshd.wire.branch import EARLY_MAX, GO, ClientBranch
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.messages import SetupConnectionResponse

# Branches opened ahead: a client that comes while another one is opened finds one.
AHEAD_MAX = 2
# A branch ahead of its client is kept so long after the last client, and an unused trunk so long.
AHEAD_S = 5.0
TRUNK_S = 60.0
# The response and what came behind it.
RECEIVE_SIZE = 1 << 16
FOREVER_S = 1e9
LOOK_S = 3600.0


class ForwardClient:
    """A client of the forward that has no pair yet. early: what it sent, and `is_started` whether it was read."""

    __slots__ = ("early", "is_started", "left", "tries")

    def __init__(self, left: Side) -> None:
        self.left = left
        self.early = b""
        self.is_started = False
        self.tries = 0

    def is_there(self) -> bool:
        """Whether there is one to serve: it is open, or has left bytes."""
        return bool(self.early) or is_open(self.left.reading)


class _Asked:
    """A branch that was told GO."""

    __slots__ = ("asked_s", "branch", "client", "deadline_s", "trunk")

    def __init__(self, client: ForwardClient, opened: Opened, timeout_s: float) -> None:
        assert opened.branch is not None
        assert opened.trunk is not None
        self.client = client
        self.branch: ClientBranch = opened.branch
        self.trunk: Trunk = opened.trunk
        self.asked_s = time.monotonic()
        self.deadline_s = self.asked_s + timeout_s


class _BranchSide(Side):
    """The guest's side of a pair; tells when it is closed."""

    __slots__ = ("_on_close",)

    def __init__(self, fd: int, on_close: Callable[[], None]) -> None:
        super().__init__(fd)
        self._on_close = on_close

    def close(self, *, is_reset: bool = False) -> None:
        super().close(is_reset=is_reset)
        self._on_close()


class Branches:
    """Invariant: a branch is in `_ahead` before it has a client, in `_asked` from GO to its response, and then in a
    pair. `_trunks` are the trunks that the loop watches; each counts its branches in `_asked` and in pairs.
    """

    def __init__(
        self,
        name: str,
        dialer: Dialer,
        patience: Patience,
        pairs: Pairs,
        openings: Openings,
        fail: Callable[[ForwardClient, VshError], None],
    ) -> None:
        """name: of the way that clients of this forward wait for. fail: gets each client that could not be served."""
        self._name = name
        self._dialer = dialer
        self._patience = patience
        self._pairs = pairs
        self._openings = openings
        self._fail = fail
        self._ahead: dict[int, Opened] = {}
        self._asked: dict[int, _Asked] = {}
        self._trunks: list[Trunk] = []
        # Openings under way: for clients, and ahead of them.
        self._opening = 0
        self._is_opening_ahead = False
        self._used_s = time.monotonic()

    @property
    def count(self) -> int:
        """Clients that wait for the guest's response."""
        return len(self._asked)

    @property
    def is_used(self) -> bool:
        """Whether a client has a pair, or waits for one."""
        return bool(self._opening or self._is_opening_ahead or any(trunk.users for trunk in self._trunks))

    def bring(self, client: ForwardClient) -> None:
        """Brings a client to the guest."""
        self._used_s = time.monotonic()
        if self._ahead and not client.is_there():
            self._fail(client, ClientLeft("the client left before it was served"))
            return
        if self._ahead:
            fd, opened = self._ahead.popitem()
            self._pairs.ignore(fd)
            self._ask(client, opened)
            return

        def open_one() -> Opened:
            if not client.is_there():
                raise ClientLeft("the client left before its turn came")
            try:
                return self._patience.open(self._dialer.open, client.is_there)
            except VshError as error:
                if is_full(error) and not client.is_there():
                    raise ClientLeft("the client left while it waited") from error
                raise

        def done(opened: Opened) -> None:
            self._opening -= 1
            self._adopt_new()
            if opened.trunk is None:
                self._pairs.add(client.left, Side(opened.fd), to_right=client.early, to_left=opened.rest)
            else:
                self._ask(client, opened)

        def failed(error: VshError) -> None:
            self._opening -= 1
            self._adopt_new()
            self._fail(client, error)

        self._opening += 1
        self._openings.start(self._name, open_one, done, failed)

    def tend(self) -> float:
        """Does what is due; the seconds until the next such moment."""
        self._adopt_new()
        now_s = time.monotonic()
        for fd, asked in list(self._asked.items()):
            if asked.deadline_s > now_s:
                break
            self._give_up(fd, asked)
        if self._ahead and self._used_s + AHEAD_S <= now_s:
            for fd in list(self._ahead):
                self._drop_ahead(fd)
        is_idle = not self.is_used
        is_over = is_idle and self._used_s + TRUNK_S <= now_s
        for trunk in list(self._trunks):
            if not trunk.users and (is_over or not self._dialer.is_current(trunk)):
                self._lose(trunk)
        moments = [asked.deadline_s for asked in list(self._asked.values())[:1]]
        if self._ahead:
            moments.append(self._used_s + AHEAD_S)
        if self._trunks and is_idle:
            moments.append(self._used_s + TRUNK_S)
        # A client may wait without a limit, and poll() does not take one so large.
        return min(LOOK_S, max(0.0, min(moments) - time.monotonic())) if moments else FOREVER_S

    def close(self) -> None:
        """Ends all that is in no pair."""
        self._adopt_new()
        for fd in list(self._ahead):
            self._drop_ahead(fd)
        for fd in list(self._asked):
            asked = self._forget(fd)
            os.close(fd)
            asked.client.left.close(is_reset=True)
        for trunk in list(self._trunks):
            self._lose(trunk)

    # Trunks.

    def _adopt_new(self) -> None:
        """Watches the trunks that threads have opened: what there is to read of one is its end."""
        for trunk in self._dialer.take_new():
            self._trunks.append(trunk)
            self._pairs.watch(trunk.control, lambda trunk=trunk: self._lose(trunk))  # type: ignore[misc]  # mypy cannot infer a default

    def _lose(self, trunk: Trunk) -> None:
        """Closes it; in the guest its session ends with all that belongs to it."""
        self._trunks.remove(trunk)
        self._pairs.ignore(trunk.control)
        os.close(trunk.control)
        self._leave(trunk)

    def _leave(self, trunk: Trunk) -> None:
        """Gives it no more clients."""
        self._dialer.forget(trunk)
        for fd, opened in list(self._ahead.items()):
            if opened.trunk is trunk:
                self._drop_ahead(fd)

    # Branches ahead of their clients.

    def _open_ahead(self) -> None:
        """One more, unless clients themselves are having branches opened."""
        if self._opening or self._is_opening_ahead or len(self._ahead) >= AHEAD_MAX:
            return

        def done(opened: Opened) -> None:
            self._is_opening_ahead = False
            if opened.trunk is None or not self._dialer.is_current(opened.trunk):
                os.close(opened.fd)
                return
            self._ahead[opened.fd] = opened
            # It says nothing before GO: what there is to read is its end.
            self._pairs.watch(opened.fd, lambda: self._drop_ahead(opened.fd))
            self._open_ahead()

        def failed(_: VshError) -> None:
            self._is_opening_ahead = False

        self._is_opening_ahead = True
        timeout_s = self._patience.timeout_s
        self._openings.start(self._name, lambda: self._dialer.open_ahead(timeout_s), done, failed)

    def _drop_ahead(self, fd: int) -> None:
        del self._ahead[fd]
        self._pairs.ignore(fd)
        os.close(fd)

    # From GO to the pair.

    def _ask(self, client: ForwardClient, opened: Opened) -> None:
        """Tells a branch to connect. What the client has sent goes along: most clients speak first, and at once."""
        if not client.is_started:
            client.is_started = True
            try:
                client.early = os.read(client.left.reading, EARLY_MAX - len(GO))
            except OSError:
                # Nothing yet; or a reset, which the pair will meet.
                pass
        fd = opened.fd
        client.tries += 1
        asked = self._asked[fd] = _Asked(client, opened, self._patience.timeout_s)
        asked.trunk.users += 1
        self._pairs.watch(fd, lambda: self._hear(fd))
        data = GO + client.early
        try:
            # The first bytes behind the proof: they fit, or the branch is gone.
            is_sent = os.write(fd, data) == len(data)
        except OSError:
            is_sent = False
        if not is_sent:
            self._miss(fd, "it takes nothing")

    def _hear(self, fd: int) -> None:
        asked = self._asked[fd]
        try:
            data = os.read(fd, RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._miss(fd, "it ended")
            return
        try:
            response = asked.branch.receive_data(data)
        except RemoteProtocolError as error:
            self._miss(fd, str(error))
            return
        if response is None:
            return
        self._forget(fd)
        if response.status == messages.READY:
            self._patience.note_served()
            asked.trunk.users += 1
            right = _BranchSide(fd, lambda: self._end_one(asked.trunk))
            self._pairs.add(asked.client.left, right, to_left=asked.branch.rest)
            self._open_ahead()
            return
        os.close(fd)
        refusal = _explain(response)
        if self._patience.is_worth_another(refusal, asked.asked_s):
            self.bring(asked.client)
        else:
            self._fail(asked.client, refusal)

    def _end_one(self, trunk: Trunk) -> None:
        trunk.users -= 1
        self._used_s = time.monotonic()

    def _miss(self, fd: int, why: str) -> None:
        """A branch without a response: its session may have ended before GO came, and there may be another by now."""
        asked = self._forget(fd)
        os.close(fd)
        if asked.client.tries == 1:
            self._leave(asked.trunk)
            self.bring(asked.client)
        else:
            self._fail(asked.client, VshError(f"the forward's session in the guest gave no answer: {why}"))

    def _give_up(self, fd: int, asked: _Asked) -> None:
        """The time is over, unless others were served meanwhile."""
        error = Unanswered(
            "the forward's session in the guest does not answer", hint="the guest may be paused or stuck"
        )
        if self._patience.is_worth_another(error, asked.asked_s):
            del self._asked[fd]
            asked.asked_s = time.monotonic()
            asked.deadline_s = asked.asked_s + self._patience.timeout_s
            self._asked[fd] = asked
            return
        self._forget(fd)
        os.close(fd)
        self._fail(asked.client, error)

    def _forget(self, fd: int) -> _Asked:
        self._pairs.ignore(fd)
        asked = self._asked.pop(fd)
        asked.trunk.users -= 1
        return asked


def _explain(response: SetupConnectionResponse) -> VshError:
    """The guest's refusal as an error."""
    failure = response.extended.failure if response.extended is not None else None
    text = response.description.decode("utf-8", "replace")
    if failure is None:
        return VshError(text)
    return ExecError(text, kind=failure.kind, error=failure.error)
