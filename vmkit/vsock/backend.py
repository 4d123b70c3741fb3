"""The one event loop of the device process: it waits, hands out what happened, and ends when the front-end leaves.

This module keeps a device from stalling. A wake-up can be lost when both sides go to sleep at the same moment. One side
stores an index and then reads the other's request for a wake-up; the other stores the request and then reads the index.
If either read overtakes the store before it, both sides sleep on. Three nets catch this, each under the one before:

1. A fence stands between our stores and our reads (vring.full_fence).
2. Before each sleep the loop requests kicks, and *then* checks everything, also whether an interrupt became due. It
   checks again some microseconds later: an emulator may run a guest's fence as no fence at all.
3. After each burst of work the first sleeps are short, and each is twice the one before, up to one second. While
   connections exist it stays at that. Without any, the last sleep has no end, and costs nothing. The loop counts the
   wake-ups that this net catches.
"""

import os
import select
import signal
import socket
import time
from typing import Final

from vmkit.vsock import vhost_user as vu
from vmkit.vsock.control import ControlDoor
from vmkit.vsock.device import Device
from vmkit.vsock.hostside import HostSide
from vmkit.vsock.muxer import FIRST_HOST_PORT, LAST_HOST_PORT, MAX_CONNECTIONS, Muxer
from vmkit.vsock.notices import Notices
from vmkit.vsock.tap import Tap
from vmkit.vsock.traffic import HOLD_TIME_S, MAX_TX_CHAINS, Traffic
from vmkit.vsock.vring import RingError

# The timed net under lost wake-ups.
FIRST_NET_S: Final = 0.01
LAST_NET_S: Final = 1.0
# Turns of packets between two looks at the descriptors, so that accepts and closes are not starved by traffic.
MAX_ROUNDS: Final = 16
# Credit that is missing for more than a whole period is asked for.
PROBE_PERIOD_S: Final = 1.0
# After the front-end has left, programs get so long to take what their guest wrote last.
DRAIN_TIMEOUT_S: Final = 5.0


def choose_host_port() -> int:
    """The first host port of a device, at random, as the kernel's own transport does.

    A guest may still close connections of an earlier device: of before a snapshot, or of one that was replaced. For up
    to 8 s it answers a REQUEST from the port of such a connection by RST.
    """
    return FIRST_HOST_PORT + int.from_bytes(os.urandom(4)) % (LAST_HOST_PORT + 1 - FIRST_HOST_PORT)


class VhostUserBackend:
    """The device process. Invariant: between two turns, all work that needs no waiting is done."""

    def __init__(
        self,
        frontend: socket.socket,
        listener: socket.socket,
        uds_path: str,
        guest_cid: int,
        notices: Notices,
        *,
        privileged_ports: tuple[int, ...] = (),
        max_connections: int = MAX_CONNECTIONS,
        control: socket.socket | None = None,
    ) -> None:
        """`frontend` is the connection to QEMU, or a listening socket to which it will connect once.

        control: a listening socket for programs that trace and bring about faults. All sockets become ours.
        """
        self._notices = notices
        self._epoll = select.epoll()
        self._device = Device(guest_cid, notices.tell, self._watch_kick, self._unwatch_kick)
        self._muxer = Muxer(
            guest_cid,
            notices.tell,
            privileged_ports=privileged_ports,
            max_connections=max_connections,
            first_host_port=choose_host_port(),
        )
        self._host = HostSide(self._epoll, listener, uds_path, self._muxer, notices.tell)
        self._traffic = Traffic(self._device, self._muxer, self._host, notices.tell)
        self._host.attach(self._traffic)
        self._door: ControlDoor | None = None
        if control is not None:
            interference = self._host.interference
            self._door = ControlDoor(
                self._epoll, control, interference, self._set_tap, self._traffic.recent, notices.tell
            )
        self._kicks: set[int] = set()
        self._decoder = vu.Decoder()
        self._starts_seen = 0
        self._resets_seen = 0
        self._net_s: float | None = None
        self._is_netted = False
        # The last turn ended because it had lasted long, not because there was nothing left.
        self._is_busy = False
        self._next_expiry_s: float | None = None
        self._next_probe_s = 0.0
        self._drain_until_s: float | None = None
        self._is_stopped = False
        self._signals: set[int] = set()
        self._status = 0
        self._frontend = frontend
        frontend.setblocking(False)
        self._epoll.register(frontend, select.EPOLLIN)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def run(self) -> int:
        """Serves until the front-end leaves or a signal stops it; returns the exit status."""
        try:
            self._catch_signals()
            while not self.is_finished():
                self.step()
            return self._status
        finally:
            self.close()

    def step(self) -> None:
        """Waits for events, and does all work that follows from them."""
        self._sleep_and_dispatch()
        self._take_turn()
        if self._traffic.tap is not None and self._door is not None:
            self._door.flush()
        self._host.bury()

    def is_finished(self) -> bool:
        """Whether the device has ended its work."""
        if self._is_stopped:
            return True
        if self._drain_until_s is None:
            return False
        return not self._muxer.member_count or time.monotonic() >= self._drain_until_s

    # Waiting.

    def _sleep_and_dispatch(self) -> None:
        timeout_s = self._choose_timeout_s()
        if timeout_s != 0 and self._has_news():
            timeout_s = 0
        events = self._epoll.poll(timeout_s)
        self._is_netted = not events and timeout_s != 0
        if self._is_netted and self._traffic.is_holding and self._device.is_running:
            self._traffic.release_held()
        for fd, mask in events:
            # A kick says only that there is something; the rings say what.
            if fd in self._kicks or self._host.handle(fd, mask):
                continue
            if fd == self._frontend.fileno():
                self._handle_frontend()
            elif fd == self._wake_fd:
                self._handle_signals()
            elif self._door is not None:
                self._door.handle(fd, mask)

    def _choose_timeout_s(self) -> float | None:
        """Returns the longest sleep; 0 when there is work, None for a sleep without end."""
        self._next_expiry_s = self._host.find_next_deadline_s()
        try:
            if self._device.is_running and (self._is_busy or self._traffic.prepare_sleep()):
                return 0
        except RingError as error:
            self._break_device(error)
        timeout_s = self._net_s if self._device.is_running else None
        if timeout_s is not None and self._traffic.is_holding:
            timeout_s = HOLD_TIME_S
        for time_s in (self._next_expiry_s, self._drain_until_s):
            if time_s is not None:
                wait_s = max(0.0, time_s - time.monotonic())
                timeout_s = wait_s if timeout_s is None else min(timeout_s, wait_s)
        return timeout_s

    def _has_news(self) -> bool:
        try:
            return self._device.is_running and self._traffic.has_news()
        except RingError as error:
            self._break_device(error)
            return True

    def _spread_net(self, has_moved: bool) -> None:
        """Chooses the length of the next sleep: short after work, longer each time it ends without any."""
        if has_moved:
            self._net_s = FIRST_NET_S
        elif self._net_s is not None and self._is_netted:
            is_longest = self._net_s >= LAST_NET_S
            self._net_s = min(LAST_NET_S, self._net_s * 2)
            if is_longest and not self._muxer.member_count:
                self._net_s = None

    # Working.

    def _take_turn(self) -> None:
        has_moved = False
        if self._device.is_running:
            try:
                has_moved = self._move_packets()
            except RingError as error:
                self._break_device(error)
        if has_moved and self._is_netted:
            # A kick was lost, or is still to come: a host that is short of CPU stops a guest between index and kick.
            self._notices.note("found-by-timed-look")
        self._spread_net(has_moved)
        now_s = time.monotonic()
        if self._next_expiry_s is not None and now_s >= self._next_expiry_s:
            self._host.expire(now_s)
        if now_s >= self._next_probe_s:
            self._next_probe_s = now_s + PROBE_PERIOD_S
            self._traffic.probe_starved()

    def _move_packets(self) -> bool:
        traffic = self._traffic
        has_moved = False
        for _ in range(MAX_ROUNDS):
            count = traffic.process_tx()
            has_sent = traffic.process_rx()
            has_moved |= has_sent or count > 0
            if count < MAX_TX_CHAINS and not (has_sent and traffic.is_queueing):
                self._is_busy = False
                return has_moved
        self._is_busy = True
        return has_moved

    def _break_device(self, error: RingError) -> None:
        self._device.break_rings(str(error))
        self._follow_device(was_running=True)
        self._host.forget_guest()

    # The front-end.

    def _handle_frontend(self) -> None:
        if self._frontend.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._accept_frontend()
            return
        try:
            # One a turn: a front-end that answers quickly must not keep everybody else waiting while it talks.
            message = vu.receive_message(self._frontend, self._decoder)
            if message is not None:
                self._obey(message)
        except EOFError:
            self._end("the front-end left")
        except (vu.VhostUserError, OSError) as error:
            self._status = 1
            self._end(f"vhost-user: {error}")

    def _accept_frontend(self) -> None:
        try:
            sock, _address = self._frontend.accept()
        except OSError:
            return
        self._epoll.unregister(self._frontend)
        self._frontend.close()
        self._frontend = sock
        sock.setblocking(False)
        self._epoll.register(sock, select.EPOLLIN)

    def _obey(self, message: vu.VhostUserMessage) -> None:
        try:
            self._take_last_packets()
            was_running = self._device.is_running
            reply = self._device.handle(message)
        finally:
            message.close()
        self._follow_device(was_running=was_running)
        if reply is not None:
            try:
                self._frontend.sendall(reply)
            except BlockingIOError as error:
                raise vu.VhostUserError("the front-end does not read its replies") from error

    def _take_last_packets(self) -> None:
        """Takes the packets that the guest put into its ring before the front-end sent its message."""
        try:
            if not self._device.is_running:
                return
            for _ in range(MAX_ROUNDS):
                if not self._traffic.process_tx():
                    break
            self._traffic.release_held()
        except RingError as error:
            self._break_device(error)

    def _follow_device(self, *, was_running: bool) -> None:
        """Resumes, suspends or ends the connections after the last message started, stopped or reset the device."""
        device = self._device
        if device.reset_count != self._resets_seen:
            self._resets_seen = device.reset_count
            self._host.forget_guest()
        if device.start_count != self._starts_seen:
            self._starts_seen = device.start_count
            if not device.is_resumed:
                self._host.forget_guest()
            self._notices.tell("device", "the guest's driver runs" if not device.is_resumed else "the guest goes on")
            self._net_s = FIRST_NET_S
            self._host.resume()
        elif was_running and not device.is_running:
            self._notices.tell("device", "the rings stand still")
            self._host.suspend()

    def _set_tap(self, tap: Tap | None) -> None:
        self._traffic.tap = tap

    def _watch_kick(self, fd: int) -> None:
        # Edge-triggered and never read: a kick says only that there is something, and the rings say what.
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        self._kicks.add(fd)

    def _unwatch_kick(self, fd: int) -> None:
        self._kicks.discard(fd)
        self._epoll.unregister(fd)

    # The end.

    def _end(self, reason: str) -> None:
        """Delivers the guest's last bytes once the front-end is gone, and gives host programs a while to take them."""
        self._take_last_packets()
        self._notices.tell("exit", reason)
        self._epoll.unregister(self._frontend)
        self._host.stop_listening()
        self._host.suspend()
        self._device.close()
        self._host.end_all()
        self._host.bury()
        self._drain_until_s = time.monotonic() + DRAIN_TIMEOUT_S

    def _catch_signals(self) -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, _frame: object) -> None:
        """Notes the signal and wakes the loop. It does no more, because it runs between any two bytecodes."""
        self._signals.add(number)
        os.eventfd_write(self._wake_fd, 1)

    def _handle_signals(self) -> None:
        os.eventfd_read(self._wake_fd)
        while self._signals:
            match self._signals.pop():
                case signal.SIGHUP:
                    # The sender knows that the guest was reset (a QEMU before 8.2 does not report it), so its driver
                    # need not be waited for.
                    if not self._device.is_running:
                        self._host.forget_guest()
                case signal.SIGUSR1:
                    self._tell_counts()
                case _:
                    self._is_stopped = True

    def _tell_counts(self) -> None:
        counts = self._notices.render_counts() or "nothing"
        self._notices.tell("seen", f"{len(self._muxer.connections())} connections are open; so far: {counts}")

    def close(self) -> None:
        """Releases everything that is still held, and prints the counts of events."""
        lost = self._host.cut_all()
        if lost:
            self._notices.tell("exit", f"{lost} host programs were still connected")
        self._tell_counts()
        if self._door is not None:
            self._door.close()
        self._device.close()
        self._decoder.close()
        self._frontend.close()
        os.close(self._wake_fd)
        self._epoll.close()
