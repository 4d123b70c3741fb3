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
