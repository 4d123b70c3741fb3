"""Moves packets: from the tx ring through the muxer to the host programs' sockets, and from those into the rx ring.

It owns the order of writes (elements before indices, bytes before ends) and the queue of links that have something
for the guest. It owns no descriptors: the driver connects, closes and watches sockets when Hooks ask for it.
"""

import socket
from collections import deque
from time import time_ns
from typing import Final, Protocol

from vmkit.vsock.buffers import choose_buffers, measure_room, split_packet, trim_pieces, write_header
from vmkit.vsock.connection import ConnectionEvent, State, VsockConnection
from vmkit.vsock.device import RX, TX, Device
from vmkit.vsock.link import MAX_BATCH, Link
from vmkit.vsock.muxer import WIDEN_AFTER_BYTES, WINDOW_BYTES, Muxer, Notice
from vmkit.vsock.packet import (
    HEADER_SIZE,
    OP_CREDIT_UPDATE,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
)
from vmkit.vsock.tap import Recent, Tap, make_recent
from vmkit.vsock.vring import Chain, Vring

# The chains of one turn: enough to be worth its notification, few enough that the other direction does not wait.
MAX_TX_CHAINS: Final = 128

# A guest sends its credit at nearly every read. Each such buffer that is given back interrupts the guest's work. The
# guest does not wait for these buffers. So they are held until other packets go with them, until so large a part of the
# ring is held, or until nothing happens for so long. (It makes a round trip 15 % shorter.)
HELD_FRACTION: Final = 4
HOLD_TIME_S: Final = 0.002


class Hooks(Protocol):
    """The actions that packets ask of the driver."""

    def dial(self, link: Link) -> None:
        """Connects to the host program that the guest asked for."""

    def answer(self, link: Link) -> None:
        """Reports to the host program that the guest accepted."""

    def watch_writes(self, link: Link) -> None:
        """Calls flush() once the socket takes more: bytes are pending."""

    def retire(self, link: Link) -> None:
        """Closes the socket: the connection is CLOSING or GONE, and nothing is pending."""


class Traffic:
    """Both directions of all connections.

    Invariant between calls: no link holds views of the guest's memory. Pushed chains are published, or is_holding is
    True and they will be.
    """

    def __init__(self, device: Device, muxer: Muxer, hooks: Hooks, notice: Notice) -> None:
        self._device = device
        self._muxer = muxer
        self._hooks = hooks
        self._notice = notice
        # The host side of every connection that is not over; the connections know nothing of it.
        self.links: dict[VsockConnection, Link] = {}
        # While a program follows the packets.
        self.tap: Tap | None = None
        self.recent = make_recent()
        self._queue: deque[Link] = deque()
        self._touched: list[Link] = []
        # Whether tx buffers were taken and not given back, and whether all that are so were credit updates.
        self.is_holding = False
        self._is_only_credit = True
        self._starved: dict[Link, None] = {}
        # Links with bytes for the guest, for which all its buffers up to _cramped_idx are too small.
        self._cramped: dict[Link, None] = {}
        self._cramped_idx = 0

    def open_link(self, connection: VsockConnection) -> Link:
        """Returns the host side of a new connection; close_link() ends it."""
        link = self.links[connection] = Link(connection, None)
        return link

    def close_link(self, link: Link) -> None:
        """Ends the link of a connection that is GONE, with nothing pending. May be called twice."""
        self.links.pop(link.connection, None)

    # From the guest.

    def process_tx(self) -> int:
        """Takes packets of the guest, up to MAX_TX_CHAINS; returns how many. Raises RingError."""
        ring = self._device.tx
        chains = ring.peek(MAX_TX_CHAINS)
        if not chains:
            return 0
        ring.decline_kicks()
        count = 0
        for chain in list(chains):
            if self._muxer.strays and self._muxer.is_clogged:
                break
            self._receive_chain(chain)
            ring.push_used(0)
            count += 1
        self._flush_touched()
        self.is_holding = self._is_only_credit and ring.held_count < ring.size // HELD_FRACTION
        if not self.is_holding:
            self.release_held()
        return count

    def release_held(self) -> None:
        """Gives the guest the held tx buffers back."""
        self.is_holding = False
        self._is_only_credit = True
        if self._device.tx.publish():
            self._device.setups[TX].signal_call()

    def has_tx(self) -> bool:
        """Whether packets of the guest can be taken now."""
        return self._device.tx.has_chain and not self._muxer.is_clogged

    def _receive_chain(self, chain: Chain) -> None:
        try:
            header, payload, payload_bytes = split_packet(chain.segments)
        except ValueError as error:
            self._notice("dropped-short", str(error))
            return
        self.recent.append((time_ns(), header, True))
        if self.tap is not None:
            self.tap.note(header, payload, is_from_guest=True)
        self._is_only_credit &= header.op == OP_CREDIT_UPDATE
        connection, events = self._muxer.receive(header, payload_bytes)
        if connection is None:
            return
        link = self.links.get(connection) or self.open_link(connection)
        for event in events:
            if event is ConnectionEvent.DATA:
                link.add(trim_pieces(payload, payload_bytes, header.length), header.length)
                self._touch(link)
            else:
                self._obey(link, event)
        if link.is_starved and connection.send.free():
            self._feed(link)

    def _obey(self, link: Link, event: ConnectionEvent) -> None:
        match event:
            case ConnectionEvent.DIAL:
                self._hooks.dial(link)
            case ConnectionEvent.ANSWERED:
                self._hooks.answer(link)
            case ConnectionEvent.WAKE:
                self.enqueue(link)
            case ConnectionEvent.GUEST_ENDED:
                link.ends_after_flush = True
                self._touch(link)
            case ConnectionEvent.GUEST_DEAF:
                link.shut(socket.SHUT_RD)
                self.end(link, SHUTDOWN_SEND)
                self.enqueue(link)
            case ConnectionEvent.GONE:
                self._touch(link)
            case ConnectionEvent.DATA | ConnectionEvent.RESET:
                pass

    def _touch(self, link: Link) -> None:
        if not link.is_touched:
            link.is_touched = True
            self._touched.append(link)

    def _flush_touched(self) -> None:
        for link in self._touched:
            link.is_touched = False
            self.flush(link)
        self._touched.clear()

    def flush(self, link: Link) -> None:
        """Writes to the host program what it takes, and acts on the guest's end after the last byte."""
        connection = link.connection
        pending_bytes = link.pending_bytes
        if pending_bytes:
            try:
                left_bytes = link.flush()
            except MemoryError:
                self._drop(link)
                return
            pending_bytes -= left_bytes
            if connection.deliver(left_bytes):
                self.enqueue(link)
            receive = connection.receive
            if receive.window < WINDOW_BYTES and receive.fwd_cnt >= WIDEN_AFTER_BYTES:
                self._widen(link)
            if link.is_deaf and connection.is_open():
                self.end(link, SHUTDOWN_RECEIVE)
                self.enqueue(link)
        state = connection.state
        if pending_bytes:
            self._hooks.watch_writes(link)
        elif state is State.GONE or state is State.CLOSING:
            self._hooks.retire(link)
        elif link.ends_after_flush:
            link.ends_after_flush = False
            link.shut(socket.SHUT_WR)

    def _drop(self, link: Link) -> None:
        """Ends the connection when memory for pending bytes is missing: the program must not see a gap."""
        self._notice("no-memory", f"no memory for what a host program does not read: {link.connection!r} was reset")
        self._muxer.abandon(link.connection)
        self._hooks.retire(link)

    def _widen(self, link: Link) -> None:
        """Widens the guest's window when it has sent more than a little and the program takes it."""
        connection = link.connection
        if connection.is_open() and not connection.heard & SHUTDOWN_SEND and self._muxer.widen(connection):
            self.enqueue(link)

    # To the guest.

    def enqueue(self, link: Link) -> None:
        """Queues a link that has, or may have, something for the guest."""
        if not link.is_queued:
            link.is_queued = True
            self._queue.append(link)

    def clear(self) -> None:
        """Empties the queues: the driver was reset, and gets nothing any more."""
        for link in self._queue:
            link.is_queued = False
        self._queue.clear()
        for link in self._starved:
            link.is_starved = False
        self._starved.clear()
        self._cramped.clear()
        self.is_holding = False
        self._is_only_credit = True

    def has_rx(self) -> bool:
        """Whether something waits for the guest, and the guest has a buffer for it."""
        if self._cramped and self._has_new_buffers():
            return True
        return bool(self._queue or self._muxer.strays) and self._device.rx.has_chain

    def _has_new_buffers(self) -> bool:
        """Whether the guest gave buffers after those that were too small for a byte."""
        ring = self._device.rx
        return ring.read_idx != self._cramped_idx or ring.available() > 0

    @property
    def is_queueing(self) -> bool:
        """Whether some link waits for another turn."""
        return bool(self._queue)

    def process_rx(self) -> bool:
        """Gives each waiting link one turn; True when buffers were used. Raises RingError."""
        queue, strays = self._queue, self._muxer.strays
        if self._cramped and self._has_new_buffers():
            for link in self._cramped:
                self.enqueue(link)
            self._cramped.clear()
        if not queue and not strays:
            return False
        ring = self._device.rx
        waiting = ring.peek(1)
        if not waiting:
            return False
        ring.decline_kicks()
        first_idx = ring.used_idx
        while strays and (waiting or ring.peek(1)):
            self._put(ring, self._muxer.next_stray())
        for _ in range(len(queue)):
            if not waiting and not ring.peek(1):
                break
            link = queue.popleft()
            link.is_queued = False
            if self._serve(ring, link):
                self.enqueue(link)
        if ring.publish():
            self._device.setups[RX].signal_call()
        return ring.used_idx != first_idx

    def _serve(self, ring: Vring, link: Link) -> bool:
        """Serves one link: the packets it owes, one batch of bytes, and the packets these cause. True: another turn."""
        connection = link.connection
        if connection.has_packet() and not self._put_owed(ring, connection):
            return True
        if not link.is_readable:
            return False
        wants_turn = False
        if connection.is_flowing():
            wants_turn = self._send_batch(ring, link)
        elif link.is_hung_up and connection.is_open():
            # The program's end was told before; now its close follows.
            self.end(link, SHUTDOWN_BOTH)
        if connection.has_packet() and not self._put_owed(ring, connection):
            return True
        return wants_turn

    def _put_owed(self, ring: Vring, connection: VsockConnection) -> bool:
        """Sends a connection's packets without payload; False when the guest has too few buffers for them."""
        while connection.has_packet():
            if not ring.peek(1):
                return False
            self._put(ring, connection.next_packet())
        return True

    def _send_batch(self, ring: Vring, link: Link) -> bool:
        """Reads from the socket into buffers of the guest; True when the link wants another turn."""
        connection = link.connection
        credit = connection.send.free()
        if not credit:
            if self._end_at_last_byte(link):
                return False
            if not link.is_starved:
                link.is_starved = True
                link.starved_rounds = 0
                self._starved[link] = None
            return False
        chains, buffers, room = choose_buffers(ring, link.batch, credit)
        if not chains:
            return not ring.waiting or self._pass_small_buffers(ring, link)
        try:
            size_bytes = link.read_into(buffers, room)
        except OSError:
            self._muxer.abandon(connection)
            self._hooks.retire(link)
            return False
        if size_bytes is None:
            link.batch = max(1, link.batch // 2)
            return False
        if size_bytes == 0:
            self.end(link, SHUTDOWN_BOTH if link.is_hung_up else SHUTDOWN_SEND)
            return False
        if size_bytes == room:
            link.batch = min(MAX_BATCH, link.batch * 2)
        connection.send.spend(size_bytes)
        _give_filled(ring, connection, chains, size_bytes, self.recent, self.tap)
        return link.is_readable

    def _pass_small_buffers(self, ring: Vring, link: Link) -> bool:
        """Fills the guest's next buffers with our credit, if they hold a header and no byte.

        When no larger buffer lies behind them, puts the link aside and returns False: its bytes need a larger one.
        """
        if self._end_at_last_byte(link):
            return False
        count = 0
        for chain in ring.peek(ring.size):
            if chain.room or measure_room(chain):
                break
            count += 1
        if count == len(ring.waiting) and not ring.available():
            self._cramped[link] = None
            self._cramped_idx = ring.read_idx
            return False
        for _ in range(count):
            self._put(ring, link.connection.render_header(OP_CREDIT_UPDATE))
        return True

    def _put(self, ring: Vring, header: Header) -> None:
        """Writes one packet without payload into the next buffer. The caller has checked that there is one."""
        write_header(ring.peek(1)[0].segments, header.encode())
        ring.push_used(HEADER_SIZE)
        self.recent.append((time_ns(), header, False))
        if self.tap is not None:
            self.tap.note(header, [], is_from_guest=False)

    def _feed(self, link: Link) -> None:
        """Serves a link again: the guest gave credit."""
        self.forget(link)
        self.enqueue(link)

    def _end_at_last_byte(self, link: Link) -> bool:
        """Passes on the program's end if it comes next, and then returns True. An end needs no credit and no room."""
        if not link.is_at_end():
            return False
        self.end(link, SHUTDOWN_BOTH if link.is_hung_up else SHUTDOWN_SEND)
        return True

    def end(self, link: Link, flags: int) -> None:
        """Owes the guest a SHUTDOWN for the host program's end in a direction. After both ends, closes the socket."""
        connection = link.connection
        if not connection.is_open():
            return
        connection.end(flags)
        if not connection.is_open():
            self._hooks.retire(link)

    def probe_starved(self) -> None:
        """Asks the guest for credit that was missing at the last call, too: once per shortage. Called now and then."""
        for link in self._starved:
            link.starved_rounds += 1
            if link.starved_rounds == 2 and link.connection.state is State.OPEN:
                link.connection.probe_credit()
                self.enqueue(link)

    # Ends and sleep.

    def reset(self, link: Link) -> None:
        """Ends a connection from our side: the guest gets RST, the host program gets its pending bytes."""
        self._muxer.abandon(link.connection)
        self.flush(link)

    def forget(self, link: Link) -> None:
        """Removes a link from the waits for the guest: it is retired, or has credit again."""
        link.is_starved = False
        self._starved.pop(link, None)
        self._cramped.pop(link, None)

    def prepare_sleep(self) -> bool:
        """Asks the guest for kicks, then checks what it did meanwhile; True when there is work."""
        device = self._device
        if device.tx.request_kick() and not self._muxer.is_clogged:
            return True
        # Reads a buffer for the next byte of a host program now, while no byte waits for it.
        device.rx.peek(1)
        return bool(self._queue or self._muxer.strays or self._cramped) and device.rx.request_kick()

    def has_news(self) -> bool:
        """Checks for work a last time before a sleep, some microseconds after prepare_sleep().

        It also finds a driver that asked for an interrupt just when publish() saw no request.
        """
        device = self._device
        rx, tx = device.rx, device.tx
        if rx.signalled != rx.published_idx and rx.is_interrupt_due():
            device.setups[RX].signal_call()
        if tx.signalled != tx.published_idx and tx.is_interrupt_due():
            device.setups[TX].signal_call()
        return self.has_tx() or self.has_rx()


def _give_filled(
    ring: Vring, connection: VsockConnection, chains: list[Chain], left: int, recent: Recent, tap: Tap | None
) -> None:
    """Puts headers before the `left` bytes that were read into these chains, and gives the chains back."""
    template = b""
    template_length = -1
    for chain in chains:
        length = chain.room if chain.room < left else left
        if not length:
            return
        left -= length
        if length != template_length:
            template = connection.encode_data_header(length)
            template_length = length
        write_header(chain.segments, template)
        ring.push_used(HEADER_SIZE + length)
        recent.append((time_ns(), template, False))
        if tap is not None:
            tap.note_encoded(template, chain.payload)
