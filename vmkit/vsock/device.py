"""The device as the front-end sets it up: features, memory, two rings and their descriptors for wake-ups.

It answers vhost-user messages and builds running rings from them. It moves no packets and waits for nothing. It gives
the event loop the kick descriptors to watch. The loop reads `is_running` and `start_count` after each message.

The guest chooses much of what the front-end passes on: features, sizes, addresses, bases, and the order of its rings.
So no whole message ends the device. It refuses a message that it cannot follow, with a line in the log, and the ring
of that message stands still.

The front-end stops the rings both when a machine is paused and when its guest is reset, with the same messages. A
pause leaves the guest's memory alone, and the rings come back where they stopped. A reset brings rings that begin
anew. So the device keeps connections over a stop and judges them at the next start: `is_resumed` is True when the same
driver came back. QEMU from 8.2 on also sends RESET_DEVICE on a reset, which decides at once.

Specification: QEMU's docs/interop/vhost-user.rst.
"""

import contextlib
import os
import struct
from collections.abc import Callable
from typing import Final

from vmkit.vsock import vhost_user as vu
from vmkit.vsock.memory import MappedMemory, MemoryFaultError, map_memory
from vmkit.vsock.muxer import Notice
from vmkit.vsock.vring import RingError, RingLayout, Vring

VIRTIO_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_F_EVENT_IDX: Final = 1 << 29
VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30
VIRTIO_F_VERSION_1: Final = 1 << 32
FEATURES: Final = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC

# A front-end offers these by itself, so a driver may agree to them although we did not offer them. This device takes
# any layout of buffers (27), may skip a notification of an empty ring (24), orders its accesses in any case (36), and
# sees the reset of one ring as the front-end's stop (40).
IGNORED_FEATURES: Final = 1 << 24 | 1 << 27 | 1 << 36 | 1 << 40

PROTOCOL_F_REPLY_ACK: Final = 1 << 3
PROTOCOL_F_CONFIG: Final = 1 << 9
PROTOCOL_F_RESET_DEVICE: Final = 1 << 13
PROTOCOL_FEATURES: Final = PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG | PROTOCOL_F_RESET_DEVICE

# Named from the guest's side; the event queue, number 2, stays in the front-end.
RX: Final = 0
TX: Final = 1
RING_COUNT: Final = 2


class RingSetup:
    """The front-end's settings of one ring, and the ring itself while it runs. It owns the three descriptors."""

    __slots__ = ("addresses", "base", "call_fd", "err_fd", "is_broken", "is_enabled", "kick_fd", "ring", "size")

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        self.is_enabled = False
        self.is_broken = False
        self.kick_fd: int | None = None
        self.call_fd: int | None = None
        self.err_fd: int | None = None
        self.ring: Vring | None = None

    def signal_call(self) -> None:
        """Interrupts the guest, where it has an interrupt for this ring."""
        if self.call_fd is not None:
            _write_event(self.call_fd)

    def identity(self) -> tuple[object, ...]:
        """Returns values that are the same after a pause and different after a reset."""
        used_idx = self.ring.used_idx if self.ring else 0
        base = self.ring.base if self.ring else self.base
        return self.size, self.addresses, base, used_idx


def _write_event(fd: int) -> None:
    """Adds one to an eventfd. Ignores a failure: the front-end chose the descriptor, and alone loses by it."""
    with contextlib.suppress(OSError):
        os.eventfd_write(fd, 1)


class Device:
    """The vhost-user session. Invariant: is_running means that both rings exist and neither is broken."""

    def __init__(
        self,
        guest_cid: int,
        notice: Notice,
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
    ) -> None:
        """watch gets each kick descriptor when it comes, unwatch gets it before it is closed."""
        self._config = struct.pack("<Q", guest_cid)
        self._notice = notice
        self._watch = watch
        self._unwatch = unwatch
        # None while the driver has agreed to features that were never offered: no ring runs then.
        self._features: int | None = 0
        self._memory: MappedMemory | None = None
        self._stopped_identity: list[tuple[object, ...]] | None = None
        self.setups = [RingSetup() for _ in range(RING_COUNT)]
        self.is_running = False
        self.is_resumed = False
        self.start_count = 0
        self.reset_count = 0

    @property
    def rx(self) -> Vring:
        """The ring towards the guest; the device is running."""
        ring = self.setups[RX].ring
        if ring is None:
            raise RingError("the rx ring is not running")
        return ring

    @property
    def tx(self) -> Vring:
        """The ring from the guest; the device is running."""
        ring = self.setups[TX].ring
        if ring is None:
            raise RingError("the tx ring is not running")
        return ring

    def close(self) -> None:
        """Closes all descriptors."""
        for setup in self.setups:
            self._drop_ring(setup)
            self._replace_kick(setup, None)
            for fd in (setup.call_fd, setup.err_fd):
                if fd is not None:
                    os.close(fd)
            setup.call_fd = setup.err_fd = None
        self._update_running()

    def break_rings(self, text: str) -> None:
        """Stops both rings until the front-end sets them up again: the driver broke one."""
        self._notice("device-broken", f"{text}; vsock stops until the guest resets the device")
        for setup in self.setups:
            self._drop_ring(setup)
            setup.is_broken = True
            if setup.err_fd is not None:
                _write_event(setup.err_fd)
        self._stopped_identity = None
        self._update_running()

    # Messages.

    def handle(self, message: vu.VhostUserMessage) -> bytes | None:
        """Carries a message out, or refuses it; returns the reply to send, if any."""
        answer = self._query(message)
        if answer is not None:
            return vu.render_reply(message.request, answer)
        is_ok = self._command(message)
        is_ok &= self._update_running()
        return vu.render_reply(message.request, vu.render_u64(0 if is_ok else 1)) if message.needs_reply else None

    def _query(self, message: vu.VhostUserMessage) -> bytes | None:
        """Returns the payload of the reply to a message that has one of its own."""
        match message.request:
            case vu.GET_FEATURES:
                return vu.render_u64(FEATURES)
            case vu.GET_PROTOCOL_FEATURES:
                return vu.render_u64(PROTOCOL_FEATURES)
            case vu.GET_QUEUE_NUM:
                return vu.render_u64(RING_COUNT)
        try:
            match message.request:
                case vu.GET_CONFIG:
                    return vu.render_config_reply(message.payload, self._config)
                case vu.GET_VRING_BASE:
                    return self._stop_ring(message)
        except vu.RefusedMessageError as error:
            self._refuse(message, error)
            # The front-end waits for an answer. An empty one is the specification's word for a refused GET_CONFIG.
            return b"" if message.request == vu.GET_CONFIG else vu.render_vring_state(0, 0)
        return None

    def _command(self, message: vu.VhostUserMessage) -> bool:
        """Carries out a message without a reply of its own; False when it was refused."""
        try:
            command = _COMMANDS.get(message.request)
            if command is None:
                raise vu.RefusedMessageError("this kind of message is not known")
            command(self, message)
        except (vu.RefusedMessageError, MemoryFaultError, OSError) as error:
            self._refuse(message, error)
            return False
        return True

    def _refuse(self, message: vu.VhostUserMessage, error: Exception) -> None:
        self._notice("refused-message", f"vhost-user message {message.request}: {error}")

    def _ignore(self, message: vu.VhostUserMessage) -> None:
        """Ignores SET_OWNER, as the device has one owner, and writes to the configuration, which is read-only."""

    def _set_features(self, message: vu.VhostUserMessage) -> None:
        features = vu.parse_u64(message.payload)
        unknown = features & ~(FEATURES | IGNORED_FEATURES)
        agreed = None if unknown else features
        if agreed != self._features:
            # Running rings were built for other features.
            for setup in self.setups:
                self._drop_ring(setup)
        self._features = agreed
        if unknown:
            reason = f"features {unknown:#x} were never offered; vsock waits for a driver without them"
            raise vu.RefusedMessageError(reason)
        if not features & VHOST_USER_F_PROTOCOL_FEATURES:
            for setup in self.setups:
                setup.is_enabled = True

    def _set_protocol_features(self, message: vu.VhostUserMessage) -> None:
        features = vu.parse_u64(message.payload)
        if features & ~PROTOCOL_FEATURES:
            raise vu.RefusedMessageError(f"protocol features {features:#x} were never offered")

    def _set_memory(self, message: vu.VhostUserMessage) -> None:
        """Takes a new table. Running rings (memory hotplug) go on in the new mapping from where they are."""
        self._memory = map_memory(vu.parse_memory_table(message.payload), message.fds)
        for setup in self.setups:
            if setup.ring is not None:
                setup.base = setup.ring.base
                setup.ring = None

    def _set_size(self, message: vu.VhostUserMessage) -> None:
        setup, number = self._find_setup(message)
        self._drop_ring(setup)
        setup.size = number
        setup.is_broken = False

    def _set_base(self, message: vu.VhostUserMessage) -> None:
        setup, number = self._find_setup(message)
        self._drop_ring(setup)
        setup.base = number
        setup.is_broken = False

    def _set_address(self, message: vu.VhostUserMessage) -> None:
        address = vu.parse_vring_address(message.payload)
        setup = self._setup_at(address.ring)
        self._drop_ring(setup)
        setup.addresses = (address.desc, address.avail, address.used)
        setup.is_broken = False

    def _set_enabled(self, message: vu.VhostUserMessage) -> None:
        setup, number = self._find_setup(message)
        setup.is_enabled = number != 0
        if not setup.is_enabled:
            self._note_stop()
            self._drop_ring(setup)

    def _set_kick(self, message: vu.VhostUserMessage) -> None:
        index, has_fd = vu.parse_vring_fd(message.payload)
        setup = self._setup_at(index)
        if not has_fd:
            self._drop_ring(setup)
            self._replace_kick(setup, None)
            raise vu.RefusedMessageError(f"ring {index} has no kick descriptor, and this device does not poll")
        self._replace_kick(setup, message.take_fd())
        setup.is_broken = False

    def _set_call(self, message: vu.VhostUserMessage) -> None:
        index, has_fd = vu.parse_vring_fd(message.payload)
        setup = self._setup_at(index)
        old_fd, setup.call_fd = setup.call_fd, message.take_fd() if has_fd else None
        if old_fd is not None:
            os.close(old_fd)
        if setup.ring is not None:
            # An interrupt may have gone to the old descriptor after the front-end last looked at it.
            setup.signal_call()

    def _set_err(self, message: vu.VhostUserMessage) -> None:
        index, has_fd = vu.parse_vring_fd(message.payload)
        setup = self._setup_at(index)
        old_fd, setup.err_fd = setup.err_fd, message.take_fd() if has_fd else None
        if old_fd is not None:
            os.close(old_fd)

    def _stop_ring(self, message: vu.VhostUserMessage) -> bytes:
        """GET_VRING_BASE: stops a ring and returns the index at which it stopped."""
        index, _ = vu.parse_vring_state(message.payload)
        setup = self._setup_at(index)
        self._note_stop()
        self._drop_ring(setup)
        self._replace_kick(setup, None)
        self._update_running()
        return vu.render_vring_state(index, setup.base)

    def _reset(self, message: vu.VhostUserMessage) -> None:
        """RESET_DEVICE: the guest was reset.

        RESET_OWNER was never clear about what it resets, and is no longer sent to us.
        """
        for setup in self.setups:
            self._drop_ring(setup)
            setup.is_enabled = False
            setup.base = 0
        self._stopped_identity = None
        self.reset_count += 1

    # Rings.

    def _setup_at(self, index: int) -> RingSetup:
        if index >= RING_COUNT:
            raise vu.RefusedMessageError(f"ring {index} of {RING_COUNT}")
        return self.setups[index]

    def _find_setup(self, message: vu.VhostUserMessage) -> tuple[RingSetup, int]:
        state = vu.parse_vring_state(message.payload)
        return self._setup_at(state.ring), state.number

    def _drop_ring(self, setup: RingSetup) -> None:
        if setup.ring is not None:
            setup.base = setup.ring.base
            setup.ring = None

    def _replace_kick(self, setup: RingSetup, fd: int | None) -> None:
        if setup.kick_fd is not None:
            # The front-end holds the same open file, so closing ours would not take it out of an epoll set.
            self._unwatch(setup.kick_fd)
            os.close(setup.kick_fd)
            setup.kick_fd = None
        if fd is not None:
            try:
                self._watch(fd)
            except OSError:
                os.close(fd)
                raise
            setup.kick_fd = fd

    def _note_stop(self) -> None:
        """Remembers how the rings stood when the first of them stops."""
        if self.is_running:
            self._stopped_identity = [setup.identity() for setup in self.setups]

    def _build_ring(self, index: int) -> Vring | None:
        """Returns the ring, if the front-end has sent all settings that it needs."""
        setup = self.setups[index]
        if setup.kick_fd is None or not setup.is_enabled or setup.is_broken:
            return None
        if setup.addresses is None or self._memory is None or self._features is None:
            return None
        layout = RingLayout(
            self._memory,
            setup.size,
            setup.addresses,
            has_event_idx=bool(self._features & VIRTIO_F_EVENT_IDX),
            has_indirect=bool(self._features & VIRTIO_F_INDIRECT_DESC),
        )
        return Vring(self._memory, layout, base=setup.base, is_writable=index == RX)

    def _update_running(self) -> bool:
        """Builds the rings that can run, and notes whether the device runs. False when a ring's settings are wrong."""
        is_ok = True
        for index, setup in enumerate(self.setups):
            if setup.ring is not None:
                continue
            try:
                setup.ring = self._build_ring(index)
            except RingError as error:
                self._notice("refused-ring", f"ring {index} stands still: {error}")
                setup.is_broken = True
                is_ok = False
            if setup.ring is not None and setup.base:
                # A ring that goes on may owe an interrupt from before it stopped; one too many does no harm.
                setup.signal_call()
        is_running = all(setup.ring is not None for setup in self.setups)
        if is_running and not self.is_running:
            self.start_count += 1
            self.is_resumed = self._stopped_identity == [setup.identity() for setup in self.setups]
            self._stopped_identity = None
        self.is_running = is_running
        return is_ok


_COMMANDS: Final[dict[int, Callable[[Device, vu.VhostUserMessage], None]]] = {
    vu.SET_FEATURES: Device._set_features,
    vu.SET_PROTOCOL_FEATURES: Device._set_protocol_features,
    vu.SET_OWNER: Device._ignore,
    vu.RESET_OWNER: Device._reset,
    vu.SET_MEM_TABLE: Device._set_memory,
    vu.SET_VRING_NUM: Device._set_size,
    vu.SET_VRING_BASE: Device._set_base,
    vu.SET_VRING_ADDR: Device._set_address,
    vu.SET_VRING_ENABLE: Device._set_enabled,
    vu.SET_VRING_KICK: Device._set_kick,
    vu.SET_VRING_CALL: Device._set_call,
    vu.SET_VRING_ERR: Device._set_err,
    vu.SET_CONFIG: Device._ignore,
    vu.RESET_DEVICE: Device._reset,
}
