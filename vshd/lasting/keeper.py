"""The process that keeps one lasting session: its target, its output, and the clients that are attached to it.

Owns the loop. It runs as the session's user, without a thread. Its ceilings: the ring's size, CLIENTS_MAX clients with
one piece of output and one window of input each, CALLS_MAX calls under way.
"""

import _socket
import os
import select
import time

from vshd import signals
from vshd.flags import Options
from vshd.lasting.place import MESSAGE_MAX, find_peer
from vshd.lasting.ring import Ring
from vshd.lasting.watcher import WRITING, LastingSession, RingConnection, Watcher
from vshd.log import Log
from vshd.processes import end_session, reap
from vshd.session import audit
from vshd.session.refusal import RefusalError
from vshd.session.running import RunningTarget
from vshd.session.session import make_limits
from vshd.session.target import Target
from vshd.wire import kept, messages
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.kept import KeeperAnswer, KeeperCall, SessionRecord
from vshd.wire.messages import Failure
from vshd.wire.server import ServerConnection

CLIENTS_MAX = 32
CALLS_MAX = 32
_INT_SIZE = 4


class SessionKeeper:
    """Invariant: `_masks` are the descriptors that are polled, beside the wake-up's and the listener's."""

    def __init__(
        self,
        listener: "_socket.socket",
        target: Target,
        ring: Ring,
        record: SessionRecord,
        options: Options,
        log: Log,
        wakeup: signals.Wakeup,
        owner: int,
    ) -> None:
        """record: what is known of the session; the keeper adds the rest. owner: the uid of vshd, whose processes alone
        may call."""
        self.record = record
        self.kept = LastingSession(ring)
        self.kept.running = RunningTarget(target, RingConnection(self.kept), self._forget)
        self._listener = listener
        self._options = options
        self._log = log
        self._wakeup = wakeup
        self._owner = owner
        self._calls: dict[int, _socket.socket] = {}
        self._watchers: dict[int, Watcher] = {}
        self._is_forgotten = False
        self._is_stopping = False
        self._ended_at_s = 0.0
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        listener.setblocking(False)
        self._poll.register(listener.fileno(), select.POLLIN)
        self._poll.register(wakeup.fd, select.POLLIN)

    def run(self) -> None:
        """Keeps the session until it is forgotten, too old, or vshd ends all sessions."""
        self.kept.running.look_for_exit()
        self._look_for_end()
        while not (self._is_forgotten or self._is_stopping or self._is_too_old()):
            self._turn()
        self._listener.close()
        reason = "vshd is shutting down" if self._is_stopping else "the session was forgotten"
        for watcher in list(self._watchers.values()):
            watcher.side.refuse(reason, Failure(messages.SHUTDOWN if self._is_stopping else messages.NO_SESSION))
            watcher.side.flush()
        if self.kept.exit is None:
            self.kept.running.close()
            end_session(self.kept.running.target.pid, has_terminal=self.record.has_pty)

    def _is_too_old(self) -> bool:
        return self.kept.exit is not None and time.monotonic() >= self._ended_at_s + self._options.lasting_time

    # The loop.

    def _turn(self) -> None:
        running = self.kept.running
        for fd, watcher in self._watchers.items():
            self._want(fd, watcher.find_mask(), True)
        if self.kept.exit is None:
            for fd, mask, keeps_errors in running.wants():
                self._want(fd, mask, keeps_errors)
        timeout_s = self._find_wait()
        for fd, mask in self._poll.poll(None if timeout_s is None else timeout_s * 1000 + 1):
            self._serve(fd, mask)
        if self.kept.exit is None:
            running.read_drained_terminal()
            # The ring has a copy.
            running.sent_all()
            self._look_for_end()
        for fd, watcher in list(self._watchers.items()):
            watcher.feed()
            if watcher.is_over:
                self._drop(fd, watcher)

    def _serve(self, fd: int, mask: int) -> None:
        """One of the descriptors is ready."""
        if fd == self._listener.fileno():
            self._accept()
        elif fd == self._wakeup.fd:
            self._take_signals()
        elif fd in self._calls:
            self._take_call(self._calls.pop(fd))
        elif fd in self._watchers:
            self._watchers[fd].side.receive(mask, lambda: False)
        elif self.kept.exit is None:
            self.kept.running.serve(fd, mask)

    def _find_wait(self) -> float | None:
        waits = [wait_s for watcher in self._watchers.values() if (wait_s := watcher.side.check_silence()) is not None]
        if self.kept.exit is not None:
            waits.append(max(0.0, self._ended_at_s + self._options.lasting_time - time.monotonic()))
        elif self.kept.running.is_terminal_draining:
            return 0
        return min(waits, default=None)

    def _want(self, fd: int, mask: int, keeps_errors: bool) -> None:
        """Polls `fd` for `mask`; for an empty one only if its errors are wanted, since poll() always reports those."""
        if not mask and not keeps_errors:
            self._forget(fd)
        elif self._masks.get(fd) != mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask

    def _forget(self, fd: int) -> None:
        if self._masks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _take_signals(self) -> None:
        self._is_stopping = signals.SIGTERM in self._wakeup.take()
        if self.kept.exit is None:
            self.kept.running.look_for_exit()

    def _look_for_end(self) -> None:
        running = self.kept.running
        if not running.has_ended:
            return
        exit = running.exit
        assert exit is not None
        running.close()
        reap(running.target.pid)
        self.kept.exit = exit
        self.record.code, self.record.signal, self.record.core_dumped = exit.code, exit.signal, exit.core_dumped
        self.record.ended_s = max(1, int(time.time()))
        self._ended_at_s = time.monotonic()
        record = self.record
        self._log.info(
            audit.render_end(
                f"session {os.fsdecode(record.id)} user {os.fsdecode(record.user)}",
                exit,
                os.fsdecode(record.command) or "login shell",
                seconds=max(0.0, time.time() - record.started_s),
                count=running.count,
            )
        )

    def _drop(self, fd: int, watcher: Watcher) -> None:
        del self._watchers[fd]
        if self.kept.writer is watcher:
            self.kept.change_writer(None)
        self._forget(fd)
        os.close(fd)

    # Calls of other processes of vshd.

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # typeshed lacks it
        except OSError:
            return
        channel = _socket.socket(fileno=fd)
        if len(self._calls) >= CALLS_MAX or find_peer(channel)[1] not in (0, self._owner):
            channel.close()
            return
        channel.setblocking(False)
        self._calls[fd] = channel
        self._poll.register(fd, select.POLLIN)

    def _take_call(self, channel: "_socket.socket") -> None:
        self._poll.unregister(channel.fileno())
        fds: list[int] = []
        try:
            data, ancillary, _, _ = channel.recvmsg(
                MESSAGE_MAX, _socket.CMSG_SPACE(_INT_SIZE), _socket.MSG_CMSG_CLOEXEC
            )
            for _, _, words in ancillary:
                fds += memoryview(words).cast("i").tolist()
            call = KeeperCall()
            call.merge(data)
            try:
                answer = self._obey(call, fds)
            except RefusalError as refusal:
                answer = KeeperAnswer(os.fsencode(refusal.description), refusal.failure)
            channel.send(answer.encode())
        except (OSError, RemoteProtocolError):
            # The caller is gone, or is no vshd of this version.
            pass
        finally:
            for fd in fds:
                os.close(fd)
            channel.close()

    def _obey(self, call: KeeperCall, fds: list[int]) -> KeeperAnswer:
        """Raises RefusalError. Takes a descriptor out of `fds` that it keeps."""
        # As kill(2) has it: root, and the session's own user.
        if call.caller not in (1, self.record.uid + 1):
            raise RefusalError("the session is another user's", messages.NO_SESSION)
        running, has_ended = self.kept.running, self.kept.exit is not None
        if call.verb == kept.SIGNAL:
            if has_ended:
                raise RefusalError("the session has ended", messages.BAD_REQUEST)
            running.signal(call.signal)
        elif call.verb == kept.FORGET:
            if not has_ended:
                raise RefusalError("the session still runs", messages.BUSY)
            self._is_forgotten = True
        elif call.verb == kept.ATTACH:
            self._attach(call, fds)
        elif call.verb != kept.LOOK:
            raise RefusalError(f"vshd knows no verb {call.verb}", messages.BAD_REQUEST)
        record, ring = self.record, self.kept.ring
        record.start, record.end = ring.start, ring.end
        record.watchers = len(self._watchers)
        record.has_writer = self.kept.writer is not None
        return KeeperAnswer(record=record)

    def _attach(self, call: KeeperCall, fds: list[int]) -> None:
        attach, peer = call.attach, call.peer
        if attach is None or peer is None or not fds:
            raise RefusalError("the call has no client", messages.BAD_REQUEST)
        if attach.mode == messages.INPUT and self.kept.exit is not None:
            raise RefusalError("the session has ended", messages.BAD_REQUEST)
        is_writing = attach.mode in WRITING
        if is_writing and self.kept.writer is not None and not attach.steal:
            raise RefusalError("another client writes to the session", messages.BUSY)
        if len(self._watchers) >= CLIENTS_MAX:
            raise RefusalError(f"{CLIENTS_MAX} clients are attached to the session", messages.LIMIT)
        connection = ServerConnection(make_limits(self._options))
        connection.adopt(peer, call.is_deferred, call.early)
        fd = fds.pop()
        os.set_blocking(fd, False)
        watcher = self._watchers[fd] = Watcher(fd, connection, attach, self.kept)
        connection.accept(self.record.pid)
        watcher.say_position()
        if is_writing:
            self._make_writer(watcher)
        watcher.side.receive_early()
        self._log.info(f"session {os.fsdecode(self.record.id)}: {os.fsdecode(call.who)} is attached")

    def _make_writer(self, watcher: Watcher) -> None:
        before, running, attach = self.kept.writer, self.kept.running, watcher.attach
        if before is not None:
            before.side.refuse("another client has taken the session over", Failure(messages.BUSY))
            before.side.flush()
        self.kept.change_writer(watcher)
        if running.stdin.fd < 0:
            watcher.side.connection.close_stream(messages.STDIN)
        if self.record.has_pty and self.kept.exit is None and attach.rows > 0 and attach.cols > 0:
            running.resize(attach.rows, attach.cols)
            # Its size may be the same; a program that fills the screen draws it anew all the same.
            running.signal(signals.SIGWINCH)
