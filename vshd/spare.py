"""Has a session's process ready ahead of its client: one that served before, or one that was forked in a quiet moment.

A fork is cheap, but a fresh child must copy every page it touches. A process that has served a session has touched
them, and a new spare touches them in a rehearsal. Spares exist only while connections come one after another, so that
an idle daemon is one process.
"""

import _socket
import os
import select
import sys

from vshd.flags import Options
from vshd.session.account import choose_account
from vshd.session.refusal import RefusalError
from vshd.session.target import build_environment
from vshd.signals import SIGTERM, Wakeup
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.events import RequestReceived
from vshd.wire.frames import LEGACY_MAX_PAYLOAD, encode_frame
from vshd.wire.messages import ConnectionStatusMessage, GuestMessage, SetupConnectionRequest
from vshd.wire.server import ServerConnection

WHO_MAX = 100
# The sessions that run have the processor first.
REHEARSAL_PRIORITY = 10
_INT_SIZE = 4
# A new spare is forked so long after a connection that found the last one: a short command has ended by then, and its
# process is there again. Forked at once, it would take a lone processor from the session that starts: a third of its
# time in an emulated guest.
DELAY_S = 0.1
# Of so many processes that serve, the youngest, the channel stays open, and the last one to end becomes the spare.
SERVING_MAX = 8


class Spare:
    """The server's side of a process that serves one connection at a time, over its channel.

    Invariant: the process ends, when it has no connection, once the channel is closed.
    """

    __slots__ = ("_channel", "pid")

    def __init__(self, pid: int, channel: "_socket.socket") -> None:
        self.pid = pid
        self._channel = channel

    def hand_over(self, fd: int, who: str) -> bool:
        """Gives the process a connection; False when the process is gone."""
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(_INT_SIZE, sys.byteorder))]
        try:
            self._channel.sendmsg([who.encode()[:WHO_MAX]], ancillary)
        except OSError:
            self._channel.close()
            return False
        return True

    def dismiss(self) -> None:
        """Ends the process by closing its channel: now, or when its session has ended."""
        self._channel.close()


class Spares:
    """The one spare that waits for a connection, and the processes that serve one and may become the spare.

    It knows when a spare is due, and forks none itself. Times are those of time.monotonic().
    """

    def __init__(self, spare_time_s: float) -> None:
        """spare_time_s: so long after the last connection there is a spare for the next one."""
        self._spare_time_s = spare_time_s
        self._spare: Spare | None = None
        self._serving: dict[int, Spare] = {}
        # When a spare is to be forked; 0.0: none is missed.
        self._due_s = 0.0
        # While connections come, the next one should find a spare; 0.0: none is kept.
        self._busy_until_s = 0.0

    def is_missed(self) -> bool:
        """Whether a spare is to be forked later: a session has just started."""
        return bool(self._due_s)

    def is_over(self, now_s: float) -> bool:
        """Whether the last connection was so long ago that no spare is kept."""
        return bool(self._busy_until_s) and now_s >= self._busy_until_s

    def is_due(self, now_s: float) -> bool:
        """Whether a spare is to be forked now."""
        return bool(self._busy_until_s) and bool(self._due_s) and now_s >= self._due_s

    def find_wait(self, now_s: float) -> float | None:
        """Returns after how many milliseconds without events is_over() or is_due() turns true; None: never."""
        if not self._busy_until_s:
            return None
        return max(0.0, (self._due_s or self._busy_until_s) - now_s) * 1000 + 1

    def expect(self, now_s: float) -> None:
        """A connection has come, and others may follow."""
        self._busy_until_s = now_s + self._spare_time_s

    def hand_over(self, fd: int, who: str) -> Spare | None:
        """Gives the spare a connection and returns it; None: there is no spare."""
        spare, self._spare = self._spare, None
        return spare if spare is not None and spare.hand_over(fd, who) else None

    def add(self, spare: Spare, now_s: float) -> None:
        """This process serves a connection from now on."""
        if now_s < self._busy_until_s:
            if len(self._serving) == SERVING_MAX:
                # The oldest: a session that has taken long takes longer.
                self._serving.pop(next(iter(self._serving))).dismiss()
            self._serving[spare.pid] = spare
        else:
            spare.dismiss()
        if self._busy_until_s and not self._due_s:
            self._due_s = now_s + DELAY_S

    def take_back(self, pid: int) -> Spare | None:
        """Returns a process that has served its connection; None: it ends by itself."""
        return self._serving.pop(pid, None)

    def keep(self, spare: Spare, now_s: float) -> None:
        """Keeps a process as the spare if connections still come, in place of another: its pages are as it needs them,
        and those of one that has not served yet are not all.
        """
        if now_s >= self._busy_until_s:
            spare.dismiss()
            return
        if self._spare is not None:
            self._spare.dismiss()
        self._spare = spare
        self._due_s = 0.0

    def forget(self, pid: int) -> None:
        """A process has ended."""
        gone = self._serving.pop(pid, None)
        if gone is not None:
            gone.dismiss()
        if self._spare is not None and pid == self._spare.pid:
            self._spare.dismiss()
            self._spare = None

    def dismiss(self) -> None:
        """Keeps no spare until the next connection."""
        self._busy_until_s = self._due_s = 0.0
        if self._spare is not None:
            self._spare.dismiss()
            self._spare = None

    def dismiss_all(self) -> None:
        """Keeps no spare, and the processes that serve will serve no other connection."""
        self.dismiss()
        while self._serving:
            self._serving.popitem()[1].dismiss()


def make_channel() -> "tuple[_socket.socket, _socket.socket]":
    """Returns the server's end and the spare's end of a new channel."""
    return _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)


def wait_for_connection(channel: "_socket.socket", wakeup: Wakeup) -> tuple[int, str] | None:
    """Waits, in the spare, for its connection and the peer's name; None when the spare was dismissed."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(wakeup.fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wakeup.fd:
                if SIGTERM in wakeup.take():
                    return None
                continue
            who, ancillary, _, _ = channel.recvmsg(WHO_MAX, _socket.CMSG_SPACE(_INT_SIZE))
            for _, _, data in ancillary:
                received = int.from_bytes(data[:_INT_SIZE], sys.byteorder)
                os.set_inheritable(received, False)
                return received, who.decode()
            return None


def is_waited_for(channel: "_socket.socket") -> bool:
    """Whether a connection for the spare has come already."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def rehearse(options: Options) -> None:
    """Runs a session without a target, to touch its pages; at low priority, if it may raise the priority again."""
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        # A container's root may not raise it, whatever capabilities it has in its own user namespace.
        os.setpriority(os.PRIO_PROCESS, 0, priority - 1)
    except OSError:
        _play(options)
        return
    os.setpriority(os.PRIO_PROCESS, 0, REHEARSAL_PRIORITY)
    _play(options)
    os.setpriority(os.PRIO_PROCESS, 0, priority)


def _play(options: Options) -> None:
    request = SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"true"], env={b"TERM": b"linux"}, nopty=True)
    request.extended = default_limits()
    connection = ServerConnection(default_limits() if options.extended else None)
    for event in connection.receive_data(encode_frame(request.encode(), LEGACY_MAX_PAYLOAD)):
        if isinstance(event, RequestReceived):
            try:
                build_environment(event.request, choose_account(event.request, options), inherit=options.inherit_env)
            except RefusalError:
                return
    connection.accept(1)
    end = GuestMessage(messages.DATA_MESSAGE, messages.DataMessage(messages.STDIN))
    connection.receive_data(encode_frame(end.encode(), LEGACY_MAX_PAYLOAD))
    connection.send_data(messages.STDOUT, b"x")
    for stream in (messages.STDOUT, messages.STDERR):
        connection.send_end(stream)
    ConnectionStatusMessage().encode()
    connection.send_exit(0)
    connection.output.take()
