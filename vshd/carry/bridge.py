"""Carries bytes between pairs of descriptors, both ways, each way with an end of its own: the loop of every forward.

Owns its descriptors from add() on. Knows nothing of the bytes' meaning and of the peers. Shared with vsh, whose
forwards are the same on the other side, so that no part of it belongs to the daemon alone.

A way keeps only the rest of one read that its sink has not taken, in memory or (bulk) in a conduit. While there is such
a rest, it does not read its source, and the transport's own flow control holds up the sender.
"""

import _socket
import errno
import os
import select
import struct
import time

from vshd.carry.conduit import LEAVING_CAPACITY, SPLICE_SIZE, Conduit, open_conduit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# More than a default socket buffer holds: one read empties it. One for all pairs.
BUFFER_SIZE = 1 << 18
# A read of this much leaves more behind, and so many may follow one another; then the other pairs have their turn.
# After less a second read would most often find nothing, which costs as much as finding something.
BULK_SIZE = 1 << 17
READS_AT_ONCE = 8
# A way that brought bulk goes through a conduit until it brings less than this.
QUIET_SIZE = 1 << 13
# Two descriptors each, and each at most as full as BUFFER_SIZE; further stalled ways are copied.
CONDUITS_MAX = 16

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Side:
    """One end of a pair: a connected socket. Another kind of file overrides end() and close()."""

    __slots__ = ("_socket", "reading", "writing")

    # No other process moves a position in it by reading or writing: of files splice(2) does not lock that.
    is_spliceable = True
    # Whether close() tells the peer at once that nothing more will be written.
    is_ended_by_close = True

    def __init__(self, fd: int, connection: "_socket.socket | None" = None) -> None:
        """connection: the socket of `fd`, non-blocking already; it spares four calls of the kernel."""
        self.reading = fd
        self.writing = fd
        if connection is None:
            os.set_blocking(fd, False)
            connection = _socket.socket(fileno=fd)
        self._socket = connection

    def end(self) -> None:
        """Nothing more will be written."""
        try:
            self._socket.shutdown(_socket.SHUT_WR)
        except OSError:
            pass

    def stop(self) -> None:
        """Nothing more will be read: where the transport has a word for it, the sender learns it."""
        try:
            self._socket.shutdown(_socket.SHUT_RD)
        except OSError:
            pass

    def error(self) -> int:
        """How a connect() under way ended: an errno, 0 when it is connected."""
        return self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)

    def close(self, *, is_reset: bool = False) -> None:
        """is_reset: what the other side got as a reset goes on as one."""
        if is_reset and self._socket.family in (_socket.AF_INET, _socket.AF_INET6):
            try:
                self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass
        self._socket.close()


class Way:
    """One direction. Invariant: `rest` and what is in `conduit` are what `sink` has not taken yet, never both; while
    there is some, nothing is read. A way has a conduit only for such a rest.
    """

    __slots__ = ("conduit", "is_bulk", "is_ending", "is_over", "is_spliceable", "rest", "sink", "source")

    def __init__(self, source: Side, sink: Side, rest: bytes) -> None:
        self.source = source
        self.sink = sink
        self.rest: memoryview | bytes = rest
        self.conduit: Conduit | None = None
        self.is_bulk = False
        self.is_spliceable = source.is_spliceable and sink.is_spliceable
        self.is_ending = False
        self.is_over = False

    @property
    def is_waiting(self) -> bool:
        """For its sink to take a rest."""
        return bool(self.rest) or self.conduit is not None


class Pair:
    """Two sides and the two ways between them. `deadline_s` is set while the right side's connect() is under way;
    `is_stale` when what it waits for, or whether it goes on, has to be looked at anew.
    """

    __slots__ = ("deadline_s", "is_reset", "is_stale", "left", "on_end", "right", "ways")

    def __init__(self, left: Side, right: Side, to_right: bytes, to_left: bytes) -> None:
        self.left = left
        self.right = right
        self.ways = (Way(left, right, to_right), Way(right, left, to_left))
        self.deadline_s = 0.0
        self.is_reset = False
        self.is_stale = False
        self.on_end: Callable[[int], None] | None = None


class Pairs:
    """Invariant: every pair is in `_pairs` under each of its descriptors, exactly until it has ended."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        self._pairs: dict[int, Pair] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._connecting: set[Pair] = set()
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        # For the next bulk, empty; those with a rest are their ways'.
        self._conduit: Conduit | None = None
        self._conduit_count = 0
        self.count = 0

    def add(self, left: Side, right: Side, *, to_right: bytes = b"", to_left: bytes = b"") -> Pair:
        """Carries between two open sides. to_right, to_left: what was read already and goes first."""
        pair = Pair(left, right, to_right, to_left)
        for side in (left, right):
            self._pairs[side.reading] = self._pairs[side.writing] = pair
        self.count += 1
        self._want_pair(pair)
        return pair

    def add_connecting(
        self, left: Side, right: Side, deadline_s: float, on_end: "Callable[[int], None]", *, to_right: bytes = b""
    ) -> Pair:
        """The same, with a connect() of the right side under way. on_end is told the errno when it fails."""
        pair = self.add(left, right, to_right=to_right)
        pair.deadline_s = deadline_s
        pair.on_end = on_end
        self._connecting.add(pair)
        self._want_pair(pair)
        return pair

    def watch(self, fd: int, serve: "Callable[[], None]", mask: int = select.POLLIN) -> None:
        """Calls `serve` whenever fd can be read (or what else `mask` asks for), or has ended."""
        self._watched[fd] = serve
        self._want(fd, mask)

    def ignore(self, fd: int) -> None:
        """Watches fd no more; the caller owns it."""
        self._watched.pop(fd, None)
        self._want(fd, 0)

    def turn(self, timeout_s: float | None = None) -> None:
        """Waits for something to do, at most timeout_s, and does it."""
        if self._connecting:
            left_s = max(0.0, min(pair.deadline_s for pair in self._connecting) - time.monotonic())
            timeout_s = left_s if timeout_s is None else min(left_s, timeout_s)
        for fd, mask in self._poll.poll(None if timeout_s is None else timeout_s * 1000 + 1):
            watcher = self._watched.get(fd)
            if watcher is not None:
                watcher()
                continue
            pair = self._pairs.get(fd)
            # An earlier one of this turn may have ended it.
            if pair is not None:
                self._serve(pair, fd, mask)
        self._check_deadlines()

    def close(self) -> None:
        """Ends every pair."""
        for pair in set(self._pairs.values()):
            pair.is_reset = True
            self._end(pair)
        if self._conduit is not None:
            self._close_conduit(self._conduit)
            self._conduit = None

    # Readiness.

    def _want(self, fd: int, mask: int) -> None:
        """Polls `fd` for `mask`; not at all for an empty one, since poll() would still report its errors."""
        if self._masks.get(fd, 0) == mask:
            return
        if mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask
        else:
            self._poll.unregister(fd)
            del self._masks[fd]

    def _want_pair(self, pair: Pair) -> None:
        masks: dict[int, int] = {}
        is_open = not pair.deadline_s
        for way in pair.ways:
            if not way.is_over and is_open:
                masks[way.source.reading] = masks.get(way.source.reading, 0) | (0 if way.is_waiting else select.POLLIN)
                masks[way.sink.writing] = masks.get(way.sink.writing, 0) | (select.POLLOUT if way.is_waiting else 0)
        if not is_open:
            masks[pair.right.writing] = select.POLLOUT
        for side in (pair.left, pair.right):
            for fd in (side.reading, side.writing):
                self._want(fd, masks.get(fd, 0))

    def _serve(self, pair: Pair, fd: int, mask: int) -> None:
        """Carries what `fd` is ready for. Every call counts here: under emulation this loop's own work is the limit."""
        if pair.deadline_s:
            error = pair.right.error()
            if error:
                self._fail(pair, error)
                return
            pair.deadline_s = 0.0
            self._connecting.discard(pair)
            pair.is_stale = True
        for way in pair.ways:
            if way.is_over:
                continue
            is_due = (way.sink.writing == fd and mask & ~select.POLLIN) if way.is_waiting else way.source.reading == fd
            if is_due:
                self._carry(pair, way)
        if not pair.is_stale:
            return
        pair.is_stale = False
        if all(way.is_over for way in pair.ways):
            self._end(pair)
        else:
            self._want_pair(pair)

    def _check_deadlines(self) -> None:
        if not self._connecting:
            return
        now_s = time.monotonic()
        for pair in [pair for pair in self._connecting if pair.deadline_s <= now_s]:
            self._fail(pair, errno.ETIMEDOUT)

    # Bytes.

    def _carry(self, pair: Pair, way: Way) -> None:
        """What there is of one way, as far as the sink takes it."""
        for turn in range(READS_AT_ONCE):
            if way.is_waiting:
                if not self._write_rest(pair, way):
                    return
                pair.is_stale = True
            if way.is_ending:
                way.is_over = pair.is_stale = True
                # At the end of both ways their close tells the same, with a packet less.
                if not (way.sink.is_ended_by_close and all(each.is_over for each in pair.ways)):
                    way.sink.end()
                return
            try:
                size = self._pass(pair, way) if way.is_bulk else self._copy(pair, way)
            except BlockingIOError:
                if turn == 0:
                    # And yet it was said to have something: TCP's urgent data, which only a read steps over.
                    way.is_bulk = False
                return
            except OSError:
                # Reset: nothing of the pair can be whole any more.
                self._break(pair)
                return
            if not size:
                way.is_ending = True
            elif way.is_over or way.is_waiting or size < BULK_SIZE:
                return

    def _copy(self, pair: Pair, way: Way) -> int:
        """What one read brings, 0 at the end. Raises OSError of the read."""
        size = os.readv(way.source.reading, [self._buffer])
        if size:
            self._write(pair, way, self._buffer[:size])
            way.is_bulk = size >= SPLICE_SIZE and way.is_spliceable
        return size

    def _pass(self, pair: Pair, way: Way) -> int:
        """The same for bulk, through a conduit."""
        conduit = self._conduit or self._open_conduit()
        if conduit is None:
            # There is none to be had, now or ever; or too many wait just now.
            way.is_bulk = False
            way.is_spliceable = self._conduit_count == CONDUITS_MAX
            return self._copy(pair, way)
        try:
            size = conduit.fill(way.source.reading, BUFFER_SIZE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            way.is_bulk = way.is_spliceable = False
            return self._copy(pair, way)
        way.is_bulk = size >= QUIET_SIZE
        if not size:
            # The end, or urgent data with the end somewhere behind it: a read tells.
            return self._copy(pair, way)
        way.conduit, self._conduit = conduit, None
        if not self._write_rest(pair, way):
            pair.is_stale = True
        return size

    def _write_rest(self, pair: Pair, way: Way) -> bool:
        """True when all of it went."""
        conduit = way.conduit
        if conduit is None:
            rest, way.rest = way.rest, b""
            return self._write(pair, way, rest)
        try:
            while conduit.size:
                conduit.drain(way.sink.writing, conduit.size)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:
                self._give_up(pair, way)
                return False
            way.is_spliceable = False
            way.is_bulk = False
            way.rest = conduit.read(conduit.size)
        way.conduit = None
        self._keep_conduit(conduit)
        return not way.rest or self._write_rest(pair, way)

    def _write(self, pair: Pair, way: Way, data: "memoryview | bytes") -> bool:
        """True when all of it went; a rest is kept."""
        try:
            sent = os.write(way.sink.writing, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._give_up(pair, way)
            return False
        if sent == len(data):
            return True
        way.rest = bytes(memoryview(data)[sent:])
        pair.is_stale = True
        return False

    def _give_up(self, pair: Pair, way: Way) -> None:
        """Ends one way, whose reader is gone, so that the sender learns of it. The other way may go on."""
        way.is_over = pair.is_stale = True
        self._drop_rest(way)
        way.source.stop()

    def _drop_rest(self, way: Way) -> None:
        way.rest = b""
        if way.conduit is not None:
            self._close_conduit(way.conduit)
            way.conduit = None

    # Conduits.

    def _open_conduit(self) -> Conduit | None:
        if self._conduit_count == CONDUITS_MAX:
            return None
        self._conduit = open_conduit(LEAVING_CAPACITY)
        self._conduit_count += self._conduit is not None
        return self._conduit

    def _keep_conduit(self, conduit: Conduit) -> None:
        """An empty one, for the next bulk."""
        if self._conduit is None:
            self._conduit = conduit
        else:
            self._close_conduit(conduit)

    def _close_conduit(self, conduit: Conduit) -> None:
        conduit.close()
        self._conduit_count -= 1

    # Ends.

    def _break(self, pair: Pair) -> None:
        pair.is_reset = pair.is_stale = True
        for way in pair.ways:
            way.is_over = True

    def _fail(self, pair: Pair, error: int) -> None:
        on_end = pair.on_end
        pair.is_reset = True
        self._end(pair)
        if on_end is not None:
            on_end(error)

    def _end(self, pair: Pair) -> None:
        self._connecting.discard(pair)
        for way in pair.ways:
            self._drop_rest(way)
        for side in (pair.left, pair.right):
            for fd in (side.reading, side.writing):
                self._want(fd, 0)
                self._pairs.pop(fd, None)
            side.close(is_reset=pair.is_reset)
        self.count -= 1
