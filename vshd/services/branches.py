"""A forward with branches (docs/reference/protocol.md 3.4): one process here for all connections of a client's forward.

The client's connection stands for the forward. For each of its own clients it makes a branch: one more connection, to a
listener of this process, which connects to the forward's place then. Runs in a session's process, as the session's
user. No look-up and no connect() may hold up the loop: it carries the other branches' bytes meanwhile.
"""

import _socket
import errno
import os
import select
import time

from vshd.carry import endpoints, vsock
from vshd.carry.bridge import Pairs, Side
from vshd.carry.endpoints import PlaceError
from vshd.flags import Options
from vshd.listener import Listener, open_beside, parse_allowed_cids
from vshd.log import Log, Throttle
from vshd.services.forward import CONNECT_TIMEOUT_S, watch_for_stop
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup
from vshd.wire import messages
from vshd.wire.branch import TOKEN_SIZE, ServerBranch, encode_acceptance, encode_refusal
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.messages import Failure
from vshd.wire.requests import Forward

# Branches at once; later ones wait in the backlog. Each has two descriptors, and these are for the rest.
BRANCHES_MAX = 512
RESERVED_FDS = 64
# Those that have proven nothing yet, and how long they may take. The oldest makes room for a new one.
STRANGERS_MAX = 64
PROOF_TIMEOUT_S = 10.0
# For want of what comes free by itself: a place in the backlog of a UNIX socket, descriptors, memory.
RETRY_S = 0.05
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPTANCE = encode_acceptance()


def open_branches(forward: Forward, fd: int, options: Options) -> "BranchServer":
    """Listens for branches where the client that is at the other end of `fd` can connect. Raises RefusalError."""
    if len(forward.token) != TOKEN_SIZE or forward.back:
        raise RefusalError("branches without their token", messages.BAD_REQUEST)
    place = os.fsdecode(forward.branches)
    try:
        addresses = endpoints.find_fixed(place)
        listener, description = open_beside(fd, parse_allowed_cids(options.allow_cid))
    except (PlaceError, vsock.VsockError, OSError) as error:
        # The client then asks for each connection by itself, and is told what is wrong with the place.
        raise RefusalError(f"no branches: {error}", messages.BAD_REQUEST) from error
    return BranchServer(place, addresses, listener, description, forward.token)


class _Opening:
    """A branch whose connection to the place is being opened. `connection` is None while it waits for a retry."""

    __slots__ = ("connection", "deadline_s", "fd", "index", "rest")

    def __init__(self, fd: int, rest: bytes) -> None:
        self.fd = fd
        self.rest = rest
        self.index = 0
        self.deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self.connection: _socket.socket | None = None


class BranchServer:
    """Invariant: an accepted connection is in `_waiting` until GO has come, then in `_openings`, then in `_pairs`. Of
    those in `_waiting`, `_strangers` have not shown the secret; both dictionaries are in the order of their deadlines.
    """

    def __init__(
        self,
        place: str,
        addresses: "list[tuple[int, tuple[object, ...] | str]]",
        listener: Listener,
        description: bytes,
        token: bytes,
    ) -> None:
        """addresses: those of the place. description: where the listener is, for the client."""
        self.description = description
        self._place = place
        self._addresses = addresses
        self._listener = listener
        self._token = token
        self._pairs = Pairs()
        self._waiting: dict[int, ServerBranch] = {}
        self._strangers: dict[int, float] = {}
        self._openings: dict[int, _Opening] = {}
        self._max = min(BRANCHES_MAX, max(1, (os.sysconf("SC_OPEN_MAX") - RESERVED_FDS) // 2))
        self._accept_from_s = 0.0
        self._retry_from_s = 0.0
        self._served = 0
        self._throttle: Throttle | None = None

    def run(self, fd: int, rest: bytes, wakeup: Wakeup, log: Log) -> str:
        """Serves branches for as long as the client's connection stands. fd: the client's; see services.table."""
        self._throttle = Throttle(log)
        stop = watch_for_stop(self._pairs, wakeup)
        # The client has nothing to say: whatever there is to read is its end.
        self._pairs.watch(fd, lambda: stop.append(1))
        is_listening = False
        try:
            while not stop:
                wait_s = self._tend()
                if is_listening != self._has_room():
                    is_listening = not is_listening
                    self._listen(is_listening)
                self._pairs.turn(wait_s)
        finally:
            self._close()
            os.close(fd)
        return f"closed, after {self._served} connections,"

    def _close(self) -> None:
        self._listener.close()
        for fd in list(self._waiting):
            self._drop(fd)
        for opening in list(self._openings.values()):
            self._end(opening)
            os.close(opening.fd)
        self._pairs.close()

    def _has_room(self) -> bool:
        count = len(self._waiting) + len(self._openings) + self._pairs.count
        return count < self._max and not self._accept_from_s

    def _listen(self, is_wanted: bool) -> None:
        if is_wanted:
            self._pairs.watch(self._listener.socket.fileno(), self._accept)
        else:
            self._pairs.ignore(self._listener.socket.fileno())

    def _tend(self) -> float | None:
        """Does what is due; the seconds until the next such moment, None for none."""
        if not (self._strangers or self._openings or self._accept_from_s):
            return None
        now_s = time.monotonic()
        for fd, deadline_s in list(self._strangers.items()):
            if deadline_s > now_s:
                break
            self._drop(fd, f"a branch without a secret for {PROOF_TIMEOUT_S:g} s")
        if self._retry_from_s and self._retry_from_s <= now_s:
            self._retry_from_s = 0.0
            for opening in [opening for opening in self._openings.values() if opening.connection is None]:
                self._connect(opening)
        for opening in list(self._openings.values()):
            if opening.deadline_s > now_s:
                break
            self._refuse(opening, errno.ETIMEDOUT)
        if self._accept_from_s <= now_s:
            self._accept_from_s = 0.0
        moments = [moment for moment in (self._retry_from_s, self._accept_from_s) if moment]
        if self._strangers:
            moments.append(next(iter(self._strangers.values())))
        if self._openings:
            moments.append(next(iter(self._openings.values())).deadline_s)
        return max(0.0, min(moments) - now_s) if moments else None

    # Until GO.

    def _accept(self) -> None:
        try:
            fd, who, is_allowed = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._warn(f"cannot accept a branch: {error.strerror}")
            self._accept_from_s = time.monotonic() + RETRY_S
            return
        if not is_allowed:
            os.close(fd)
            self._warn(f"{who}: refused: this CID is not allowed")
            return
        if len(self._strangers) >= STRANGERS_MAX:
            self._drop(next(iter(self._strangers)), "a branch without a secret, and others came")
        os.set_blocking(fd, False)
        self._waiting[fd] = ServerBranch(self._token)
        self._strangers[fd] = time.monotonic() + PROOF_TIMEOUT_S
        self._pairs.watch(fd, lambda: self._read(fd))

    def _read(self, fd: int) -> None:
        branch = self._waiting[fd]
        try:
            data = os.read(fd, branch.wanted)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(fd)
            return
        try:
            answer = branch.receive_data(data)
            if answer:
                del self._strangers[fd]
                # The first bytes of a connection: they fit, or it is gone.
                os.write(fd, answer)
        except (RemoteProtocolError, OSError) as error:
            self._drop(fd, str(error))
            return
        if branch.is_asked:
            self._forget(fd)
            opening = self._openings[fd] = _Opening(fd, branch.rest)
            self._connect(opening)

    def _drop(self, fd: int, why: str = "") -> None:
        """Closes a branch that did not come as far as GO. why: for the log; empty when the client itself left."""
        self._forget(fd)
        os.close(fd)
        if why:
            self._warn(f"refused: {why}")

    def _forget(self, fd: int) -> None:
        self._pairs.ignore(fd)
        self._strangers.pop(fd, None)
        del self._waiting[fd]

    # From GO to the pair.

    def _connect(self, opening: _Opening) -> None:
        """Begins with the address whose turn it is, and goes on to the next as long as one fails at once."""
        while True:
            try:
                connection, code = endpoints.begin_connect(*self._addresses[opening.index], self._place)
            except PlaceError as error:
                connection, code = None, error.error
            if connection is not None and code == 0:
                self._join(opening, connection)
                return
            if connection is not None and code == errno.EINPROGRESS:
                opening.connection = connection
                self._pairs.watch(connection.fileno(), lambda: self._look(opening), select.POLLOUT)
                return
            if connection is not None:
                connection.close()
            if code in _SCARCE:
                self._retry_from_s = self._retry_from_s or time.monotonic() + RETRY_S
                return
            if not self._take_next(opening, code):
                return

    def _take_next(self, opening: _Opening, code: int) -> bool:
        """After an address failed with `code`: takes the next one. After the last it refuses the branch: False."""
        if opening.index + 1 == len(self._addresses):
            self._refuse(opening, code)
            return False
        opening.index += 1
        return True

    def _look(self, opening: _Opening) -> None:
        """A connect() has come to its end."""
        connection = opening.connection
        assert connection is not None
        self._pairs.ignore(connection.fileno())
        opening.connection = None
        code = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if not code:
            self._join(opening, connection)
            return
        connection.close()
        if self._take_next(opening, code):
            self._connect(opening)

    def _join(self, opening: _Opening, connection: _socket.socket) -> None:
        """The branch and its connection become a pair."""
        self._end(opening)
        rest = opening.rest
        try:
            os.write(opening.fd, _ACCEPTANCE)
            if rest:
                # A new connection takes it at once; the loop would need a turn for that.
                rest = rest[connection.send(rest) :]
        except BlockingIOError:
            pass
        except OSError:
            # The pair meets it again.
            pass
        self._served += 1
        # Two words about the socket that the kernel need not be asked for.
        branch = _socket.socket(self._listener.socket.family, _socket.SOCK_STREAM, 0, fileno=opening.fd)
        self._pairs.add(Side(opening.fd, branch), Side(connection.fileno(), connection), to_right=rest)

    def _refuse(self, opening: _Opening, code: int) -> None:
        self._end(opening)
        text = str(endpoints.explain_connect(self._place, code))
        try:
            os.write(opening.fd, encode_refusal(os.fsencode(text), Failure(messages.UNREACHABLE, code)))
        except OSError:
            pass
        os.close(opening.fd)
        self._warn(f"refused: {text}")

    def _end(self, opening: _Opening) -> None:
        """It is no opening any more; what it had under way is closed."""
        del self._openings[opening.fd]
        if opening.connection is not None:
            self._pairs.ignore(opening.connection.fileno())
            opening.connection.close()
            opening.connection = None

    def _warn(self, text: str) -> None:
        """Every client of the forward can cause such a line."""
        assert self._throttle is not None
        self._throttle.warning(f"forward to {self._place}: {text}", time.monotonic())
