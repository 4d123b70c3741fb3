"""One vsock stream connection: packets of the guest and turns of the host program in, events and packets out.

Sans-I/O: it counts bytes and never holds one, and has no socket, no ring and no clock. The muxer finds it by its ports.
The driver keeps a record of its own for it (link.py) and obeys the events.

Specification: virtio 1.2, section 5.10.6. Linux's net/vmw_vsock/virtio_transport_common.c decides where that is silent.

The life of a connection
========================
A host program that connects to us is in GREETING until its CONNECT line is complete. It is in WAITING while no driver
runs the rings, and in REQUESTED once the device has sent the guest a REQUEST. A connection that the guest requests is
in DIALING while the device connects to the host program's socket. Both kinds reach OPEN.

OPEN has two independent directions, and each may end alone (half-close). `heard` holds what the guest will not do any
more, by its SHUTDOWN packets. `told` holds what the device has sent the guest for the host program. Both are masks of
SHUTDOWN_RECEIVE and SHUTDOWN_SEND, and only grow.

* `told` complete: the host program is gone. The guest may still have bytes of ours to read, so it decides when the
  connection is over, and then sends RST. Until then the connection is in CLOSING: the device keeps the ports reserved
  and drops the guest's packets. Linux's guests drop a socket on their side after 8 s. The driver does the same for a
  guest that never answers.
* `heard` complete: the guest is gone and waits for our RST. The device sends it at once, also while bytes for the host
  program are undelivered. The device delivers those without the guest. If it waited, a slow reader on the host could
  hold a guest's socket. The guest would cut the connection, and its own last bytes, after 8 s.
* RST from the guest has the same effect: the bytes that the device took from the ring before it still reach the host
  program.
* A connection that is GONE owes the guest nothing but that RST. The guest may use its ports again at once, and would
  take an old SHUTDOWN or CREDIT_UPDATE for one of the new connection.
* A guest that answers before the REQUEST has guessed the ports: that is a violation, too.

     state      | guest sends                          | next state
     -----------+--------------------------------------+--------------------------------------------
     REQUESTED  | RESPONSE                             | OPEN
     REQUESTED  | RST                                  | GONE (refused)
     DIALING    | RST                                  | GONE
     OPEN       | RW, CREDIT_UPDATE, CREDIT_REQUEST    | OPEN
     OPEN       | SHUTDOWN                             | OPEN, GONE + RST when `heard` is complete
     OPEN       | RST                                  | GONE
     CLOSING    | RW, CREDIT_UPDATE, CREDIT_REQUEST    | CLOSING (no program is left to read it)
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

Everything else raises and changes nothing: GuestError for a packet of the guest (the muxer answers with RST),
LifecycleError for a mistake of ours.
"""

from enum import Enum, IntEnum, auto
from typing import Final

from vmkit.vsock.credit import FrozenReceiveCredit, FrozenSendCredit, ReceiveCredit, SendCredit
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
    """The guest broke the protocol; the text names the fault. The connection is unchanged and must be reset."""


class LifecycleError(Exception):
    """A call that does not fit the connection's state: a fault of the device itself."""


class State(IntEnum):
    """The state of a connection; see the essay above. An int, for a cheap hash: each packet looks it up."""

    GREETING = auto()
    WAITING = auto()
    REQUESTED = auto()
    DIALING = auto()
    OPEN = auto()
    CLOSING = auto()
    GONE = auto()


class ConnectionEvent(Enum):
    """An action that a guest's packet asks of the driver."""

    DIAL = auto()  # reach for the host program's socket, then accept() or abandon()
    ANSWERED = auto()  # the guest accepted: tell the host program
    DATA = auto()  # the payload is for the host program
    GUEST_ENDED = auto()  # no more bytes will come: after the pending ones, end the host program's input
    GUEST_DEAF = auto()  # the guest takes no more bytes
    WAKE = auto()  # packets of ours wait to be sent
    GONE = auto()  # deliver what is pending, then close; the ports are free
    RESET = auto()  # and the guest is to be sent RST


# The packets that the guest may send in each state, and the next state; SHUTDOWN may lead further, see _hear.
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

_NO_EVENTS: Final[tuple[ConnectionEvent, ...]] = ()
_DATA: Final = (ConnectionEvent.DATA,)

# Packets that wait to be sent. Bits instead of a queue: however often a guest asks, one answer waits, and memory is
# bounded.
_REQUEST: Final = 1
_RESPONSE: Final = 2
_CREDIT_UPDATE: Final = 4
_CREDIT_REQUEST: Final = 8
_SHUTDOWN: Final = 16


class VsockConnection:
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

    def receive_packet(self, header: Header, payload_size: int) -> tuple[ConnectionEvent, ...]:
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
            return (ConnectionEvent.GONE,)
        if op == OP_RESPONSE:
            return (ConnectionEvent.ANSWERED,)
        if state is State.OPEN:
            self._owed |= _CREDIT_UPDATE
            return (ConnectionEvent.WAKE,)
        return _NO_EVENTS

    def _receive_data(self, header: Header, payload_size: int) -> tuple[ConnectionEvent, ...]:
        """RW: checks that the bytes are there and were allowed, and that the host program can take them."""
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

    def _hear(self, flags: int) -> tuple[ConnectionEvent, ...]:
        """SHUTDOWN: notes what the guest will not do any more."""
        news = flags & SHUTDOWN_BOTH & ~self.heard
        self.heard |= news
        if self.heard == SHUTDOWN_BOTH:
            self.state = State.GONE
            self._owed = 0
            return (ConnectionEvent.GONE, ConnectionEvent.RESET)
        if self.state is State.CLOSING:
            return _NO_EVENTS
        if news & SHUTDOWN_SEND:
            return (ConnectionEvent.GUEST_ENDED,)
        if news & SHUTDOWN_RECEIVE:
            return (ConnectionEvent.GUEST_DEAF,)
        return _NO_EVENTS

    # The host program's turns, reported by the driver.

    def await_driver(self) -> None:
        """Waits for a driver: the CONNECT line is complete, or the driver that had the REQUEST was reset."""
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
        """Answers the guest's REQUEST, once the host program's socket is connected."""
        self._need(State.DIALING)
        self.state = State.OPEN
        self._owed = _RESPONSE

    def end(self, flags: int) -> bool:
        """Notes that the host program will not send, not receive, or both; True when a SHUTDOWN is owed for it."""
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
        """Ends the connection from any state; True when the guest has seen it and must get RST."""
        is_known = self.state in {State.DIALING, State.OPEN, State.CLOSING}
        is_known |= self.state is State.REQUESTED and not self._owed & _REQUEST
        self.state = State.GONE
        self._owed = 0
        return is_known

    def deliver(self, size_bytes: int) -> bool:
        """Counts bytes of the guest that left our buffer; True when a CREDIT_UPDATE is owed for them."""
        self.receive.deliver(size_bytes)
        if self.state is not State.OPEN or self.heard & SHUTDOWN_SEND:
            return False
        if not self.receive.is_update_due(self.send.peer_buf_alloc):
            return False
        self._owed |= _CREDIT_UPDATE
        return True

    def widen(self, window_bytes: int) -> None:
        """Gives the guest a larger window, and announces it: the guest may already wait with the old one."""
        self._need(State.OPEN)
        self.receive.window = window_bytes
        self._owed |= _CREDIT_UPDATE

    def probe_credit(self) -> None:
        """Asks the guest to send its credit again: the net under a CREDIT_UPDATE that was lost."""
        self._need(State.OPEN)
        self._owed |= _CREDIT_REQUEST

    # Faults that a user asked for.

    def freeze_send(self) -> None:
        """From now on the guest's news of its credit changes nothing."""
        if not isinstance(self.send, FrozenSendCredit):
            self.send = FrozenSendCredit(self.send)

    def freeze_receive(self) -> None:
        """From now on the guest gets no more credit."""
        if not isinstance(self.receive, FrozenReceiveCredit):
            self.receive = FrozenReceiveCredit(self.receive)

    def thaw_send(self) -> None:
        """Takes over the credit that the guest has announced meanwhile."""
        if isinstance(self.send, FrozenSendCredit):
            self.send = self.send.thaw()

    def thaw_receive(self) -> None:
        """Owes the guest the credit that it did not get."""
        if isinstance(self.receive, FrozenReceiveCredit):
            self.receive = self.receive.thaw()
            if self.state is State.OPEN:
                self._owed |= _CREDIT_UPDATE

    # What goes to the guest.

    def is_open(self) -> bool:
        """Whether both sides have accepted the connection and neither is gone."""
        return self.state is State.OPEN

    def is_flowing(self) -> bool:
        """Whether bytes of the host program may go to the guest, credit aside."""
        return self.state is State.OPEN and not self.told & SHUTDOWN_SEND and not self.heard & SHUTDOWN_RECEIVE

    def has_packet(self) -> bool:
        """Whether a packet without payload waits to be sent."""
        return self._owed != 0

    def next_packet(self) -> Header:
        """Returns the next packet without payload, in the order the guest must see them.

        Call it only while has_packet() is true.
        """
        owed = self._owed
        for bit, op in _ORDER:
            if owed & bit:
                self._owed &= ~bit
                return self.render_header(op, flags=self.told if op == OP_SHUTDOWN else 0)
        raise LifecycleError(f"no packet is owed: {self!r}")

    def encode_data_header(self, length: int) -> bytes:
        """Returns the header of an RW packet as bytes. It equals that of render_header(), at a third of the time."""
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
        """Returns a header to the guest. It carries our credit, and so settles an owed CREDIT_UPDATE."""
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
