"""Stands between QEMU and virtiofsd on their vhost-user connection, and takes virtiofsd's place when that has ended.

The guest's requests do not come by here: they lie in memory that virtiofsd shares with the guest. Only QEMU's messages
about that memory do. They are remembered, so that requests in flight get an error at the end of virtiofsd. Otherwise
they would wait for ever, and so would the guest's unmount and the removal of the device.

A deputy remembers them as well, and goes on where a killed guard has stopped (vmkit.shares.notes).

Specification: QEMU's docs/interop/vhost-user.rst.
"""

import contextlib
import functools
import os
import select
import socket
import time
from typing import Final

from vmkit.shares.notes import Deputy, Note
from vmkit.shares.rings import FailingRing
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.memory import MappedMemory, MemoryFaultError, map_memory
from vmkit.vsock.vring import RingError, RingLayout

# QEMU takes no more of a device without a shared configuration: hiprio, requests.
RING_MAX: Final = 8
EVENT_IDX, INDIRECT = 1 << 29, 1 << 28
# VIRTIO_F_RING_PACKED: our rings are split ones.
_REFUSED_FEATURES: Final = 1 << 34
# MQ and REPLY_ACK. Without the others no message comes whose meaning is not known here.
_PROTOCOL_FEATURES: Final = 1 << 0 | 1 << 3
_ANSWERED: Final = (vu.GET_FEATURES, vu.GET_PROTOCOL_FEATURES, vu.GET_QUEUE_NUM, vu.GET_VRING_BASE)
# Of the first number of a payload that names a ring.
RING_MASK: Final = 0xFF
REPLY_DEADLINE_S: Final = 10.0
# The requests of a guest that loses a kick are found by the next look.
LOOK_S: Final = 1.0


class RelayError(Exception):
    """The connection is of no more use; the text names the fault."""


class _RelayedRing:
    """QEMU's settings of one ring. It owns the descriptors."""

    def __init__(self) -> None:
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick_fd = self.call_fd = -1
        self.is_enabled = True
        self.is_broken = False
        self.failing: FailingRing | None = None

    def set_kick(self, fd: int) -> None:
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
        self.kick_fd = fd

    def set_call(self, fd: int) -> None:
        if self.call_fd >= 0:
            os.close(self.call_fd)
        self.call_fd = fd


class DeviceRelay:
    """Invariant: what QEMU has last told of the memory and the rings is here, whether virtiofsd lives or not."""

    def __init__(self, server: socket.socket | None, deputy: Deputy | None = None) -> None:
        """server: the connection to virtiofsd, which becomes ours; None for a deputy, which has none.

        deputy: gets all that it needs to go on.
        """
        self._server = server
        if server is not None:
            server.settimeout(REPLY_DEADLINE_S)
        self._deputy = deputy
        self._qemu: socket.socket | None = None
        self._decoder = vu.Decoder()
        # For a deputy: what the guard has taken from QEMU and not answered.
        self._unanswered: vu.VhostUserMessage | None = None
        self._known: dict[int, bytes] = {}
        self._features = 0
        self._memory: MappedMemory | None = None
        self._rings = [_RelayedRing() for _ in range(RING_MAX)]

    @property
    def has_taken_over(self) -> bool:
        """virtiofsd has ended, and all that it shared is ours."""
        return self._server is None

    def greet(self) -> None:
        """Asks virtiofsd for its features: it has begun to serve when it answers. Raises RelayError."""
        assert self._server is not None
        self._server.sendall(_render(vu.GET_FEATURES, b""))
        features = self._receive_reply()
        if self._deputy is not None:
            self._deputy.note(Note.ANSWER, vu.render_reply(vu.GET_FEATURES, features))

    def connect(self, qemu: socket.socket) -> None:
        """QEMU's end has come; the connection becomes ours."""
        self._qemu = qemu
        qemu.setblocking(False)
        if self._deputy is not None:
            self._deputy.note(Note.QEMU, fds=(qemu.fileno(),))

    def list_waits(self) -> list[int]:
        """The descriptors at which there may be work: that of QEMU, and the kicks once the rings are ours."""
        found = [] if self._qemu is None else [self._qemu.fileno()]
        return found + [ring.kick_fd for ring in self._rings if self.has_taken_over and ring.kick_fd >= 0]

    def work(self) -> bool:
        """Does what there is to do; True when more is left. Raises EOFError when QEMU has left, RelayError."""
        if self._qemu is not None:
            read = (
                None if self._deputy is None else functools.partial(self._deputy.take_piece, self._qemu, self._decoder)
            )
            try:
                message = vu.receive_message(self._qemu, self._decoder, read)
                if message is not None:
                    self._carry(message)
            except (vu.VhostUserError, OSError) as error:
                raise RelayError(f"QEMU: {error}") from error
        return self.has_taken_over and self._fail_requests()

    def take_over(self) -> None:
        """Answers the guest from here on. virtiofsd must have ended: it could write to the rings until then."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Closes all descriptors."""
        self.take_over()
        self._decoder.close()
        if self._unanswered is not None:
            self._unanswered.close()
        if self._qemu is not None:
            self._qemu.close()
        for ring in self._rings:
            ring.set_kick(-1)
            ring.set_call(-1)

    # What a deputy learns from the guard's notes.

    def learn_piece(self, data: bytes, fds: list[int]) -> None:
        """The guard has taken a piece of QEMU's messages. Raises RelayError."""
        try:
            message = self._decoder.feed(data, fds)
        except vu.VhostUserError as error:
            raise RelayError(f"QEMU: {error}") from error
        if message is None:
            return
        if _wants_reply(message):
            self._unanswered = message
            return
        self._note(message)
        message.close()

    def learn_answer(self, request: int, payload: bytes) -> None:
        """The guard has answered QEMU, or virtiofsd has answered the guard."""
        if request in _ANSWERED:
            self._known[request] = payload
        if self._unanswered is not None and self._unanswered.request == request:
            self._note(self._unanswered)
            self._unanswered.close()
            self._unanswered = None

    @property
    def is_answered(self) -> bool:
        """Whether the guard had its answer to all that it has taken."""
        return self._unanswered is None

    def resume(self) -> None:
        """Answers what the guard has left. Raises RelayError."""
        message, self._unanswered = self._unanswered, None
        try:
            if message is not None:
                self._carry(message)
        except OSError as error:
            raise RelayError(f"QEMU: {error}") from error

    # Messages.

    def _carry(self, message: vu.VhostUserMessage) -> None:
        """One message of QEMU's, to virtiofsd and its reply back; after virtiofsd's end the reply is ours."""
        assert self._qemu is not None
        try:
            wants_reply = _wants_reply(message)
            reply = None if self.has_taken_over else self._forward(message, wants_reply=wants_reply)
            base = self._note(message)
            if message.request in (vu.SET_VRING_KICK, vu.SET_VRING_ENABLE):
                self._kick_again(message)
            if not wants_reply:
                return
            if reply is None:
                reply = self._make_reply(message, base)
            whole = vu.render_reply(message.request, reply)
            if self._deputy is None:
                self._qemu.sendall(whole)
            else:
                self._deputy.answer(self._qemu, whole)
        finally:
            message.close()

    def _forward(self, message: vu.VhostUserMessage, *, wants_reply: bool) -> bytes | None:
        """None: virtiofsd has ended, or is about to."""
        assert self._server is not None
        try:
            whole = _render(message.request, message.payload, message.flags)
            socket.send_fds(self._server, [whole], message.fds)
            return self._receive_reply() if wants_reply else None
        except (OSError, RelayError):
            self._give_up()
            return None

    def _kick_again(self, message: vu.VhostUserMessage) -> None:
        """Repeats the kick of a ring that may have begun to run with this message.

        The guest's first request can come when virtiofsd has the ring's kick, and has not enabled the ring yet. It then
        takes the kick and leaves the request, for which no other kick comes.
        """
        with contextlib.suppress(OSError, vu.RefusedMessageError):
            ring = self._ring_at(vu.parse_u64(message.payload) & RING_MASK)
            if self._server is None or ring.kick_fd < 0:
                return
            # virtiofsd takes messages in their order: at the answer it has acted on this one.
            try:
                self._server.sendall(_render(vu.GET_FEATURES, b""))
                self._receive_reply()
            except (OSError, RelayError):
                self._give_up()
                return
            os.eventfd_write(ring.kick_fd, 1)

    def _give_up(self) -> None:
        """Ends the connection: a reply that comes too late would be taken for that of a later message.

        The guard sees the end, and ends virtiofsd.
        """
        assert self._server is not None
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)

    def _receive_reply(self) -> bytes:
        """Returns the payload, without the features that are not known here. Raises RelayError."""
        try:
            request, _, size = vu.HEADER.unpack(self._receive(vu.HEADER.size))
            if size > vu.MAX_PAYLOAD_BYTES:
                raise RelayError(f"virtiofsd sent a reply of {size} bytes")
            payload = self._receive(size)
        except OSError as error:
            raise RelayError(f"virtiofsd does not answer: {error.strerror or error}") from error
        if request in (vu.GET_FEATURES, vu.GET_PROTOCOL_FEATURES) and len(payload) == 8:
            number = vu.parse_u64(payload)
            number &= ~_REFUSED_FEATURES if request == vu.GET_FEATURES else _PROTOCOL_FEATURES
            payload = vu.render_u64(number)
        if request in _ANSWERED:
            self._known[request] = payload
        return payload

    def _receive(self, size: int) -> bytes:
        assert self._server is not None
        data = b""
        while len(data) < size:
            piece = self._server.recv(size - len(data))
            if not piece:
                raise RelayError("virtiofsd has ended")
            data += piece
        return data

    def _make_reply(self, message: vu.VhostUserMessage, base: int) -> bytes:
        if message.request == vu.GET_VRING_BASE:
            return message.payload[:4].ljust(4, b"\0") + base.to_bytes(4, "little")
        # 0: it has worked.
        return self._known.get(message.request, vu.render_u64(0))

    def _note(self, message: vu.VhostUserMessage) -> int:
        """Remembers what a message says; returns the base of a ring that it stops."""
        try:
            return self._do_note(message)
        except (vu.RefusedMessageError, MemoryFaultError, RingError, OSError):
            # virtiofsd has refused it, too, or the ring stands still.
            return 0

    def _do_note(self, message: vu.VhostUserMessage) -> int:
        payload = message.payload
        match message.request:
            case vu.SET_FEATURES:
                self._features = vu.parse_u64(payload)
            case vu.SET_MEM_TABLE:
                self._memory = map_memory(vu.parse_memory_table(payload), message.fds)
                for ring in self._rings:
                    ring.failing = None
            case vu.SET_VRING_NUM:
                ring, number = self._find(payload)
                ring.size, ring.failing, ring.is_broken = number, None, False
            case vu.SET_VRING_ADDR:
                address = vu.parse_vring_address(payload)
                ring = self._ring_at(address.ring)
                ring.addresses, ring.failing = (address.desc, address.avail, address.used), None
            case vu.SET_VRING_ENABLE:
                ring, number = self._find(payload)
                ring.is_enabled = number != 0
            case vu.SET_VRING_KICK | vu.SET_VRING_CALL:
                index, has_fd = vu.parse_vring_fd(payload)
                ring = self._ring_at(index)
                fd = message.take_fd() if has_fd else -1
                (ring.set_kick if message.request == vu.SET_VRING_KICK else ring.set_call)(fd)
            case vu.GET_VRING_BASE:
                ring, _ = self._find(payload)
                base = 0
                if self.has_taken_over and (failing := self._open(ring)) is not None:
                    base = failing.base
                ring.failing = None
                ring.set_kick(-1)
                return base
        return 0

    def _find(self, payload: bytes) -> tuple[_RelayedRing, int]:
        state = vu.parse_vring_state(payload)
        return self._ring_at(state.ring), state.number

    def _ring_at(self, index: int) -> _RelayedRing:
        if index >= RING_MAX:
            raise vu.RefusedMessageError(f"ring {index}")
        return self._rings[index]

    # The guest's requests, after virtiofsd's end.

    def _open(self, ring: _RelayedRing) -> FailingRing | None:
        """Raises RingError."""
        if ring.kick_fd < 0 or ring.addresses is None or self._memory is None or ring.is_broken or not ring.is_enabled:
            return None
        if ring.failing is None:
            layout = RingLayout(
                self._memory,
                ring.size,
                ring.addresses,
                has_event_idx=bool(self._features & EVENT_IDX),
                has_indirect=bool(self._features & INDIRECT),
            )
            ring.failing = FailingRing(self._memory, layout)
        return ring.failing

    def _fail_requests(self) -> bool:
        is_more = False
        for ring in self._rings:
            with contextlib.suppress(OSError):
                if ring.kick_fd >= 0:
                    os.set_blocking(ring.kick_fd, False)
                    os.eventfd_read(ring.kick_fd)
            is_new = ring.failing is None
            try:
                failing = self._open(ring)
                if failing is None:
                    continue
                before = failing.base
                is_more |= failing.work()
            except RingError:
                # The guest's driver is broken; it has to reset the device.
                ring.is_broken = True
                continue
            # Who was here before may have ended between an answer and its interrupt.
            if (is_new or failing.base != before) and ring.call_fd >= 0:
                with contextlib.suppress(OSError):
                    os.eventfd_write(ring.call_fd, 1)
        return is_more


def serve_errors(relay: DeviceRelay) -> int:
    """Answers the guest until QEMU lets go of the device; returns a program's status."""
    is_more = True
    while True:
        wait_for(relay.list_waits(), time.monotonic() + (0.0 if is_more else LOOK_S))
        try:
            is_more = relay.work()
        except EOFError:
            return 0
        except RelayError:
            return 1


def wait_for(fds: list[int], deadline_s: float | None) -> set[int]:
    """The descriptors of these that are readable or at their end."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    wait_ms = None if deadline_s is None else max(0.0, (deadline_s - time.monotonic()) * 1000)
    return {fd for fd, _ in poll.poll(wait_ms)}


def _render(request: int, payload: bytes, flags: int = 1) -> bytes:
    return vu.HEADER.pack(request, flags, len(payload)) + payload


def _wants_reply(message: vu.VhostUserMessage) -> bool:
    return message.request in _ANSWERED or message.needs_reply
