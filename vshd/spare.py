"""A session's process made ahead of its client: the next connection finds it forked, and its memory already its own.

A fork is cheap; what costs is that a fresh child must copy every page it touches. A spare has touched them in a
rehearsal. It exists only while connections come one after another, so that an idle daemon is one process.
"""

import _socket
import os
import select
import struct

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
# linux/capability.h
CAP_SYS_NICE = 23
_FD = struct.Struct("i")


class Spare:
    """The server's side of a spare. Invariant: `pid` waits for a connection until hand_over() or dismiss()."""

    __slots__ = ("_channel", "pid")

    def __init__(self, pid: int, channel: "_socket.socket") -> None:
        self.pid = pid
        self._channel = channel

    def hand_over(self, fd: int, who: str) -> bool:
        """Gives it its connection; False when it is gone."""
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))]
        try:
            self._channel.sendmsg([who.encode()[:WHO_MAX]], ancillary)
        except OSError:
            return False
        finally:
            self._channel.close()
        return True

    def dismiss(self) -> None:
        """It is not needed: the end of its channel ends it."""
        self._channel.close()


def make_channel() -> "tuple[_socket.socket, _socket.socket]":
    """The server's and the spare's end."""
    return _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)


def wait_for_connection(channel: "_socket.socket", wakeup: Wakeup) -> tuple[int, str] | None:
    """In the spare: its connection and who that is; None when it was dismissed."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(wakeup.fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wakeup.fd:
                if SIGTERM in wakeup.take():
                    return None
                continue
            who, ancillary, _, _ = channel.recvmsg(WHO_MAX, _socket.CMSG_SPACE(_FD.size))
            channel.close()
            for _, _, data in ancillary:
                (received,) = _FD.unpack(data[: _FD.size])
                os.set_inheritable(received, False)
                return received, who.decode()
            return None


def rehearse(options: Options) -> None:
    """Plays a session without a target, for the pages that it touches; at low priority, where the way back is open."""
    if not _may_rise():
        _play(options)
        return
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, REHEARSAL_PRIORITY)
    _play(options)
    os.setpriority(os.PRIO_PROCESS, 0, priority)


def _may_rise() -> bool:
    """CAP_SYS_NICE, which root of a container has not: without it a priority that was lowered stays low."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> CAP_SYS_NICE & 1)
    return False


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
