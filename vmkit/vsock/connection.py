"""One vsock stream connection: packets of the guest and turns of the host program in, events and packets out.

Sans-I/O: it counts bytes and never holds one, knows no socket, no ring and no clock. The muxer finds it by its ports;
the driver keeps a record of its own for it (link.py) and obeys the events.

Specification: virtio 1.2, section 5.10.6, and Linux's net/vmw_vsock/virtio_transport_common.c where that is silent.

The life of a connection
========================
A host program that connects to us is in GREETING until its CONNECT line is complete, in WAITING while no driver runs
the rings, and in REQUESTED once the guest has been asked. A connection asked for by the guest is in DIALING while we
reach for the host program's socket. Both meet in OPEN.

OPEN has two independent directions, and each may end alone (half-close): `heard` holds what the guest has said it
will not do any more, `told` what we have said for the host program. Both are masks of SHUTDOWN_RECEIVE and
SHUTDOWN_SEND, and only grow.

* `told` complete: the host program is gone. The guest may still have bytes of ours to read, so it decides when the
  connection is over and says so with RST; until then we are in CLOSING, keep the ports reserved and let its packets
  fall. Linux's guests drop a socket on their side after 8 s; the driver does the same for a guest that never answers.
* `heard` complete: the guest is gone. It waits for our RST, and it gets it at once although bytes for the host
  program may be undelivered: those are ours to deliver, and the guest has no part in it any more. Waiting instead
  would let a slow reader on the host hold a guest's socket, and the guest would cut the connection, and its own
  last bytes, after 8 s.
* RST from the guest is treated alike: what it sent before the RST, and we took from the ring, still reaches the
  host program.
* What is GONE owes the guest nothing but that RST: it may use its ports again at once, and an old SHUTDOWN or
  CREDIT_UPDATE would be taken for one of the new connection.
* A guest that answers before it has been asked has guessed the ports: that is a violation, too.

     state      | guest says                           | next state
     -----------+--------------------------------------+--------------------------------------------
     REQUESTED  | RESPONSE                             | OPEN
     REQUESTED  | RST                                  | GONE (refused)
     DIALING    | RST                                  | GONE
     OPEN       | RW, CREDIT_UPDATE, CREDIT_REQUEST    | OPEN
     OPEN       | SHUTDOWN                             | OPEN, GONE + RST when `heard` is complete
     OPEN       | RST                                  | GONE
     CLOSING    | RW, CREDIT_UPDATE, CREDIT_REQUEST    | CLOSING (nobody is left to read it)
     CLOSING    | SHUTDOWN                             | CLOSING, GONE + RST when `heard` is complete
     CLOSING    | RST                                  | GONE

     state      | host program or driver               | next state
     -----------+--------------------------------------+--------------------------------------------
     GREETING   | await_driver: CONNECT line complete  | WAITING
     WAITING    | request: rings run                   | REQUESTED
     REQUESTED  | await_driver: driver was reset       | WAITING
     DIALING    | accept: socket reached               | OPEN
     OPEN       | end: no more to send or to receive   | OPEN, CLOSING when `told` is complete
     any        | abandon                              | GONE

Everything else raises and changes nothing: GuestError when it came from the guest (the muxer answers with RST),
LifecycleError when it is a mistake of ours.
"""

from enum import Enum, IntEnum, auto
from typing import Final

from vmkit.vsock.credit import ReceiveCredit, SendCredit
from vmkit.vsock.packet import (
    HEADER,
    HOST_CID,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    name_op,
)


class GuestError(Exception):
    """The guest broke the protocol; the text says how. The connection is unchanged and is to be reset."""


class LifecycleError(Exception):
    """A call that does not fit the connection's state: a fault of the device itself."""


class State(IntEnum):
    """Where a connection is in its life; see the essay above. An int, for a cheap hash: it is looked up per packet."""

    GREETING = auto()
    WAITING = auto()
    REQUESTED = auto()
    DIALING = auto()
    OPEN = auto()
    CLOSING = auto()
    GONE = auto()


class Event(Enum):
    """What a guest's packet asks of the driver."""

    DIAL = auto()  # reach for the host program's socket, then accept() or abandon()
    ANSWERED = auto()  # the guest accepted: tell the host program
    DATA = auto()  # the payload is for the host program
    GUEST_ENDED = auto()  # no more bytes will come: after the pending ones, end the host program's input
    GUEST_DEAF = auto()  # the guest takes no more bytes
    WAKE = auto()  # packets of ours wait to be sent
    GONE = auto()  # deliver what is pending, then close; the ports are free
    RESET = auto()  # and the guest is to be sent RST


# What the guest may say in each state, and where that leads; SHUTDOWN may lead further, see _hear.
_TRANSITIONS: Final = {
    (State.REQUESTED, OP_RESPONSE): State.OPEN,
    (State.REQUESTED, OP_RST): State.GONE,
    (State.DIALING, OP_RST): State.GONE,
    (State.OPEN, OP_RW): State.OPEN,
    (State.OPEN, OP_CREDIT_UPDATE): State.OPEN,
    (State.OPEN, OP_CREDIT_REQUEST): State.OPEN,
    (State.OPEN, OP_SHUTDOWN): State.OPEN,
    (State.OPEN, OP_RST): State.GONE,
    (State.CLOSING, OP_RW): State.CLOSING,
    (State.CLOSING, OP_CREDIT_UPDATE): State.CLOSING,
    (State.CLOSING, OP_CREDIT_REQUEST): State.CLOSING,
    (State.CLOSING, OP_SHUTDOWN): State.CLOSING,
    (State.CLOSING, OP_RST): State.GONE,
}

_NO_EVENTS: Final[tuple[Event, ...]] = ()
_DATA: Final = (Event.DATA,)

# Packets that wait to be sent. Bits instead of a queue: however often a guest asks, one answer waits, and memory is
# bounded.
_REQUEST: Final = 1
_RESPONSE: Final = 2
_CREDIT_UPDATE: Final = 4
_CREDIT_REQUEST: Final = 8
_SHUTDOWN: Final = 16


class Connection:
    """One connection. Invariant: `told` and `heard` only grow, and a packet is owed only while its news is unsent.

    What is GONE owes nothing.
    """

    __slots__ = ("_owed", "guest_cid", "guest_port", "heard", "host_port", "receive", "send", "state", "told")

    def __init__(self, guest_cid: int, window_bytes: int, state: State) -> None:
        self.guest_cid = guest_cid
        self.guest_port = 0
        self.host_port = 0
        self.state = state
        self.send = SendCredit()
        self.receive = ReceiveCredit(window_bytes)
        self.told = 0
        self.heard = 0
        self._owed = 0

    def __repr__(self) -> str:
        return f"connection host:{self.host_port} guest:{self.guest_port} {self.state.name.lower()}"

    # The guest's turns.

    def receive_packet(self, header: Header, payload_size: int) -> tuple[Event, ...]:
        """Takes one packet of the guest, whose chain holds payload_size bytes behind the header.

        Returns what the driver must do.
        """
        state = self.state
        op = header.op
        next_state = _TRANSITIONS.get((state, op))
        if next_state is None:
            raise GuestError(f"{name_op(op)} while {state.name.lower()}")
        if op == OP_RW:
            return self._receive_data(header, payload_size)
        if self._owed & _REQUEST:
            raise GuestError(f"{name_op(op)} before REQUEST was sent")
        self.send.update(header.buf_alloc, header.fwd_cnt)
        if op == OP_CREDIT_UPDATE:
            return _NO_EVENTS
        if op == OP_SHUTDOWN:
            return self._hear(header.flags)
        self.state = next_state
        if op == OP_RST:
            self._owed = 0
            return (Event.GONE,)
        if op == OP_RESPONSE:
            return (Event.ANSWERED,)
        if state is State.OPEN:
            self._owed |= _CREDIT_UPDATE
            return (Event.WAKE,)
        return _NO_EVENTS

    def _receive_data(self, header: Header, payload_size: int) -> tuple[Event, ...]:
        """RW: checks that the bytes are there, were allowed, and that somebody can take them."""
        length = header.length
        if length > payload_size:
            raise GuestError(f"RW of {length} bytes in a buffer of {payload_size}")
        if self.heard & SHUTDOWN_SEND:
            raise GuestError("RW after SHUTDOWN")
        if self.state is State.CLOSING:
            self.send.update(header.buf_alloc, header.fwd_cnt)
            return _NO_EVENTS
        if not self.receive.accept(length):
            raise GuestError(f"RW of {length} bytes beyond its credit")
        self.send.update(header.buf_alloc, header.fwd_cnt)
        return _DATA if length else _NO_EVENTS

    def _hear(self, flags: int) -> tuple[Event, ...]:
        """SHUTDOWN: what the guest will not do any more."""
        news = flags & SHUTDOWN_BOTH & ~self.heard
        self.heard |= news
        if self.heard == SHUTDOWN_BOTH:
            self.state = State.GONE
            self._owed = 0
            return (Event.GONE, Event.RESET)
        if self.state is State.CLOSING:
            return _NO_EVENTS
        if news & SHUTDOWN_SEND:
            return (Event.GUEST_ENDED,)
        if news & SHUTDOWN_RECEIVE:
            return (Event.GUEST_DEAF,)
        return _NO_EVENTS

    # The host program's turns, told by the driver.

    def await_driver(self) -> None:
        """The CONNECT line is complete, or the driver that was asked is no more: wait for one."""
        self._need(State.GREETING, State.REQUESTED)
        self.state = State.WAITING
        self._owed = 0

    def request(self, host_port: int) -> None:
        """Asks the guest, as `host_port`, to accept the connection."""
        self._need(State.WAITING)
        self.state = State.REQUESTED
        self.host_port = host_port
        self._owed = _REQUEST

    def accept(self) -> None:
        """The host program's socket is reached: answers the guest's REQUEST."""
        self._need(State.DIALING)
        self.state = State.OPEN
        self._owed = _RESPONSE

    def end(self, flags: int) -> bool:
        """The host program will send no more, receive no more, or both; True when a SHUTDOWN is owed for it."""
        self._need(State.OPEN)
        news = flags & ~self.told
        if not news:
            return False
        self.told |= news
        self._owed |= _SHUTDOWN
        if self.told == SHUTDOWN_BOTH:
            self.state = State.CLOSING
        return True

    def abandon(self) -> bool:
        """Ends the connection from any state; True when the guest knows of it and is to be sent RST."""
        is_known = self.state in {State.DIALING, State.OPEN, State.CLOSING}
        is_known |= self.state is State.REQUESTED and not self._owed & _REQUEST
        self.state = State.GONE
        self._owed = 0
        return is_known

    def deliver(self, size_bytes: int) -> bool:
        """Bytes of the guest left our buffer; True when a CREDIT_UPDATE is owed for it."""
        self.receive.deliver(size_bytes)
        if self.state is not State.OPEN or self.heard & SHUTDOWN_SEND:
            return False
        if not self.receive.is_update_due(self.send.peer_buf_alloc):
            return False
        self._owed |= _CREDIT_UPDATE
        return True

    def widen(self, window_bytes: int) -> None:
        """Gives the guest a larger window, and tells it so: with the old one it may wait already."""
        self._need(State.OPEN)
        self.receive.window = window_bytes
        self._owed |= _CREDIT_UPDATE

    def probe_credit(self) -> None:
        """Asks the guest to tell its credit again: the net under a CREDIT_UPDATE that was lost."""
        self._need(State.OPEN)
        self._owed |= _CREDIT_REQUEST

    # What goes to the guest.

    def is_open(self) -> bool:
        """Whether both sides know of each other and neither is gone."""
        return self.state is State.OPEN

    def is_flowing(self) -> bool:
        """Whether bytes of the host program may go to the guest, credit aside."""
        return self.state is State.OPEN and not self.told & SHUTDOWN_SEND and not self.heard & SHUTDOWN_RECEIVE

    def has_packet(self) -> bool:
        """Whether a packet without payload waits to be sent."""
        return self._owed != 0

    def next_packet(self) -> Header:
        """The next packet without payload, in the order the guest must see them.

        Call it only while has_packet() is true.
        """
        owed = self._owed
        for bit, op in _ORDER:
            if owed & bit:
                self._owed &= ~bit
                return self.render_header(op, flags=self.told if op == OP_SHUTDOWN else 0)
        raise LifecycleError(f"no packet is owed: {self!r}")

    def encode_data_header(self, length: int) -> bytes:
        """The header of an RW packet, ready to be written: what render_header() gives, at a third of the price."""
        self._owed &= ~_CREDIT_UPDATE
        receive = self.receive
        fwd_cnt = receive.told_fwd_cnt = receive.fwd_cnt
        return HEADER.pack(
            HOST_CID,
            self.guest_cid,
            self.host_port,
            self.guest_port,
            length,
            TYPE_STREAM,
            OP_RW,
            0,
            receive.window,
            fwd_cnt,
        )

    def render_header(self, op: int, *, length: int = 0, flags: int = 0) -> Header:
        """A header to the guest. It carries our credit, so an owed CREDIT_UPDATE is settled by it."""
        self._owed &= ~_CREDIT_UPDATE
        receive = self.receive
        return Header(
            HOST_CID,
            self.guest_cid,
            self.host_port,
            self.guest_port,
            length,
            TYPE_STREAM,
            op,
            flags,
            receive.window,
            receive.tell(),
        )

    def _need(self, *states: State) -> None:
        if self.state not in states:
            needed = " or ".join(state.name.lower() for state in states)
            raise LifecycleError(f"needs a connection that is {needed}, not: {self!r}")


_ORDER: Final = (
    (_REQUEST, OP_REQUEST),
    (_RESPONSE, OP_RESPONSE),
    (_CREDIT_UPDATE, OP_CREDIT_UPDATE),
    (_CREDIT_REQUEST, OP_CREDIT_REQUEST),
    (_SHUTDOWN, OP_SHUTDOWN),
)
