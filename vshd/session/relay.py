"""One running session: bytes between the client's connection and the target, both ways, none ever blocking another.

Owns the loop. The client's side is vshd.session.client's, the target's vshd.session.running's. Knows nothing of users,
programs and logs.
"""

import os
import select

from vshd import signals
from vshd.processes import Exit
from vshd.session.client import ClientSide
from vshd.session.running import RunningTarget
from vshd.session.target import Target
from vshd.wire import messages, state
from vshd.wire.events import EndOfStream, Event, Resized, Signalled, StreamClosed
from vshd.wire.messages import Failure
from vshd.wire.server import ServerConnection


class Relay:
    """Invariant: `_masks` are the descriptors that are polled, beside the wake-up's."""

    def __init__(self, fd: int, connection: ServerConnection, target: Target, wakeup: signals.Wakeup) -> None:
        """wakeup: has this process's SIGCHLD and SIGTERM."""
        self.connection = connection
        self.wakeup = wakeup
        self.running = RunningTarget(target, connection, self._forget)
        self.client = ClientSide(fd, connection, self.running.stdin, self._obey, self.running.sent_all)
        # Why the client did not get all that the ended target had printed; empty if it did.
        self.undelivered = ""
        self._poll = select.poll()
        self._poll.register(wakeup.fd, select.POLLIN)
        self._masks: dict[int, int] = {}

    @property
    def exit(self) -> Exit | None:
        """The target's, once it has ended."""
        return self.running.exit

    @property
    def lost(self) -> str:
        """Why the session ended before the target did; empty while it has not."""
        return self.client.lost

    def run(self) -> None:
        """Relays until the target has ended and all is sent, or the client is gone (`lost` says how)."""
        client, running = self.client, self.running
        client.receive_early()
        client.flush()
        running.look_for_exit()
        has_yielded = False
        while not client.lost:
            if running.has_ended and self.connection.state == state.RUNNING:
                self._send_exit()
                return
            self._turn()
            running.read_drained_terminal()
            if running.seems_to_end and not has_yielded:
                # On a lone processor the target waits in the middle of its end. All of it then leaves at once.
                has_yielded = True
                os.sched_yield()
                running.look_for_exit()
                self._turn(may_wait=False)
            # The end of a target leaves with its exit, but the reason of a loss is the last that leaves.
            if client.lost or not running.has_ended:
                client.flush()
        # A target that ended in the turn that lost the client has ended: what it left in the background lives on.
        running.look_for_exit()
        if running.has_ended:
            self.undelivered, client.lost = client.lost, ""

    def close(self) -> None:
        """Closes our ends of the target's stdio; a terminal is hung up by it."""
        self.running.close()

    # The loop.

    def _turn(self, *, may_wait: bool = True) -> None:
        """Waits, and serves each descriptor that is ready."""
        client, running = self.client, self.running
        self._want(client.fd, client.find_mask(is_reading=not running.is_stuffed), True)
        for fd, mask, keeps_errors in running.wants():
            self._want(fd, mask, keeps_errors)
        timeout_s = client.check_silence()
        if running.is_terminal_draining or not may_wait:
            timeout_s = 0
        for fd, mask in self._poll.poll(None if timeout_s is None else timeout_s * 1000 + 1):
            if fd == client.fd:
                client.receive(mask, lambda: running.is_stuffed)
            elif fd == self.wakeup.fd:
                self._take_signals()
            else:
                running.serve(fd, mask)

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

    def _obey(self, event: Event) -> None:
        running = self.running
        if isinstance(event, EndOfStream):
            running.stdin.end()
        elif isinstance(event, Signalled):
            running.signal(event.number)
        elif isinstance(event, Resized):
            running.resize(event.rows, event.cols, event.xpixels, event.ypixels)
        elif isinstance(event, StreamClosed):
            running.close_source(event.stream)

    def _take_signals(self) -> None:
        if signals.SIGTERM in self.wakeup.take():
            self.client.refuse("vshd is shutting down", Failure(messages.SHUTDOWN))
        self.running.look_for_exit()

    # The end.

    def _send_exit(self) -> None:
        exit = self.running.exit
        assert exit is not None
        if self.connection.is_extended:
            self.connection.send_end(messages.STDERR)
        self.connection.send_exit(exit.code, signal=exit.signal, core_dumped=exit.core_dumped)
        self.client.flush()
        # A client that is slow or suspended takes the rest when it can.
        while self.connection.output.size and not self.client.lost:
            self._turn()
            self.client.flush()
        self.undelivered, self.client.lost = self.client.lost, ""
