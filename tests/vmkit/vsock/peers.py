"""Two peers without I/O: a guest's sockets with Linux's manners, and the device's core with its host programs.

Each peer has a wire to the other, a queue of packets. Every byte of a stream follows from its place in it, so each side
checks what it gets and stores nothing. A peer asserts what the other may never do to it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vmkit.vsock import packet as pk
from vmkit.vsock.connection import ConnectionEvent, State, VsockConnection
from vmkit.vsock.muxer import WIDEN_AFTER_BYTES, WINDOW_BYTES, Muxer

GUEST_CID = 3
MASK = 2**32 - 1
MAX_PACKET_BYTES = 65536
Wire = deque[tuple[pk.Header, bytes]]

_PERIOD = 251
_PATTERN = bytes(range(_PERIOD)) * (2 * WINDOW_BYTES // _PERIOD)


def pattern(offset: int, size: int) -> bytes:
    """The bytes of any stream at a place."""
    start = offset % _PERIOD
    return _PATTERN[start : start + size]


# The guest: net/vmw_vsock/virtio_transport_common.c.


@dataclass
class GuestSocket:
    """A guest program's socket. Counts are bytes; `told` and `heard` are masks of SHUTDOWN flags."""

    guest: "GuestPeer"
    host_port: int
    guest_port: int
    buf_alloc: int
    is_open: bool = False
    is_closing: bool = False
    is_asking: bool = False
    written: int = 0
    sent: int = 0
    received: int = 0
    read: int = 0
    told: int = 0
    heard: int = 0
    peer_buf_alloc: int = 0
    peer_fwd_cnt: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.host_port, self.guest_port

    @property
    def credit(self) -> int:
        window = min(self.peer_buf_alloc, self.buf_alloc)
        return max(0, window - ((self.sent - self.peer_fwd_cnt) & MASK))

    @property
    def can_send(self) -> bool:
        return self.is_open and not self.told & pk.SHUTDOWN_SEND and not self.heard & pk.SHUTDOWN_RECEIVE

    def say(self, op: int, payload: bytes = b"", flags: int = 0) -> None:
        fields = (GUEST_CID, 2, self.guest_port, self.host_port, len(payload), pk.TYPE_STREAM, op, flags)
        self.guest.wire.append((pk.Header(*fields, self.buf_alloc, self.read & MASK), payload))

    def write(self, size: int) -> None:
        """The program writes, and is blocked until all is sent."""
        self.written += size
        self.push()

    def push(self) -> bool:
        """Sends what the credit allows; whether there was something."""
        has_sent = False
        while self.can_send and (size := min(self.written - self.sent, self.credit, MAX_PACKET_BYTES)):
            self.say(pk.OP_RW, pattern(self.sent, size))
            self.sent += size
            has_sent = True
        return has_sent

    def take(self, size: int, *, tells: bool) -> None:
        """The program reads; a guest need not tell each time."""
        size = min(size, self.received - self.read)
        self.read += size
        if size and tells and self.is_open:
            self.say(pk.OP_CREDIT_UPDATE)
        self._end_when_done()

    def ask(self) -> None:
        """CREDIT_REQUEST; any packet of the device answers it."""
        if self.is_open:
            self.is_asking = True
            self.say(pk.OP_CREDIT_REQUEST)

    def shutdown(self, flags: int) -> None:
        if self.is_open and flags & ~self.told:
            self.told |= flags
            self.say(pk.OP_SHUTDOWN, flags=self.told)

    def close(self) -> None:
        if self.is_closing:
            return
        if not self.is_open or self.heard == pk.SHUTDOWN_BOTH:
            self.reset()
            return
        self.shutdown(pk.SHUTDOWN_BOTH)
        self.is_open, self.is_closing = False, True

    def reset(self) -> None:
        """RST and forgotten: also what a closing socket does after 8 s. One that only asked says nothing."""
        if self.is_open or self.is_closing:
            self.say(pk.OP_RST)
        self.forget()

    def forget(self) -> None:
        self.is_open = False
        self.guest.sockets.pop(self.key, None)

    def _end_when_done(self) -> None:
        if self.is_open and self.heard == pk.SHUTDOWN_BOTH and self.read == self.received:
            self.reset()

    def hear(self, header: pk.Header, payload: bytes) -> None:
        self.peer_buf_alloc, self.peer_fwd_cnt = header.buf_alloc, header.fwd_cnt
        self.is_asking = False
        if header.op == pk.OP_RST:
            self.forget()
        elif self.is_closing:
            assert header.op not in {pk.OP_REQUEST, pk.OP_RESPONSE}, header
        elif not self.is_open:
            assert header.op == pk.OP_RESPONSE, header
            self.is_open = True
        else:
            self._hear_open(header, payload)
        self.push()

    def _hear_open(self, header: pk.Header, payload: bytes) -> None:
        match header.op:
            case pk.OP_RW:
                assert not self.heard & pk.SHUTDOWN_SEND, "bytes after their end"
                assert payload == pattern(self.received, len(payload)) and payload
                self.received += len(payload)
                assert self.received - self.read <= self.buf_alloc, "bytes beyond the guest's buffer"
            case pk.OP_SHUTDOWN:
                assert header.flags and not self.heard & ~header.flags, header
                self.heard |= header.flags
                self._end_when_done()
            case pk.OP_CREDIT_REQUEST:
                self.say(pk.OP_CREDIT_UPDATE)
            case _:
                assert header.op == pk.OP_CREDIT_UPDATE, header


class GuestPeer:
    """A guest's vsock stack. It keeps to the rules."""

    def __init__(self, listening: set[int]) -> None:
        self.listening = listening
        self.wire: Wire = deque()
        self.sockets: dict[tuple[int, int], GuestSocket] = {}

    def connect(self, host_port: int, guest_port: int, buf_alloc: int) -> GuestSocket | None:
        """A program's connect(); None where the ports are in use."""
        if (host_port, guest_port) in self.sockets:
            return None
        sock = self.sockets[(host_port, guest_port)] = GuestSocket(self, host_port, guest_port, buf_alloc)
        sock.say(pk.OP_REQUEST)
        return sock

    def receive(self, header: pk.Header, payload: bytes) -> None:
        assert (header.src_cid, header.dst_cid, header.type) == (2, GUEST_CID, pk.TYPE_STREAM), header
        assert header.length == len(payload) and (header.op == pk.OP_RW or not payload)
        sock = self.sockets.get((header.src_port, header.dst_port))
        if sock is not None:
            sock.hear(header, payload)
        elif header.op == pk.OP_REQUEST and header.dst_port in self.listening:
            sock = GuestSocket(self, header.src_port, header.dst_port, 65536, is_open=True)
            self.sockets[sock.key] = sock
            sock.peer_buf_alloc, sock.peer_fwd_cnt = header.buf_alloc, header.fwd_cnt
            sock.say(pk.OP_RESPONSE)
        elif header.op != pk.OP_RST:
            GuestSocket(self, header.src_port, header.dst_port, 0).say(pk.OP_RST)


# The device: its core as it is, and what its driver and the host programs do.


@dataclass(eq=False)
class Program:
    """A host program and the bytes that the device holds for it."""

    connection: VsockConnection
    key: tuple[int, int] = (0, 0)
    pending: bytearray = field(default_factory=bytearray)
    taken: int = 0
    written: int = 0
    sent: int = 0
    has_ended: bool = False
    is_closed: bool = False
    is_ended_by_guest: bool = False
    ends_after_pending: bool = False


class DevicePeer:
    """The muxer and its connections, driven as traffic.py and hostside.py drive them."""

    def __init__(self, listening: set[int], notice: Callable[[str, str], None], max_connections: int) -> None:
        self.listening = listening
        self.muxer = Muxer(GUEST_CID, notice, max_connections=max_connections)
        self.wire: Wire = deque()
        self.programs: dict[VsockConnection, Program] = {}
        self.dialing: list[Program] = []

    def connect(self, guest_port: int) -> Program | None:
        """A host program says CONNECT; None where no place is free."""
        connection = self.muxer.admit()
        if connection is None:
            return None
        connection.await_driver()
        self.muxer.request(connection, guest_port)
        return self._add(connection)

    def _add(self, connection: VsockConnection) -> Program:
        program = self.programs[connection] = Program(connection, (connection.host_port, connection.guest_port))
        return program

    # From the guest.

    def receive(self, header: pk.Header, payload: bytes) -> None:
        connection, events = self.muxer.receive(header, len(payload))
        if connection is None:
            return
        program = self.programs.get(connection) or self._add(connection)
        for event in events:
            match event:
                case ConnectionEvent.DIAL:
                    self.dialing.append(program)
                case ConnectionEvent.DATA:
                    assert payload == pattern(program.taken + len(program.pending), len(payload))
                    program.pending += payload
                case ConnectionEvent.GUEST_ENDED:
                    program.ends_after_pending = True
                case ConnectionEvent.GUEST_DEAF:
                    connection.end(pk.SHUTDOWN_SEND)
                case _:
                    pass
        if program.is_closed:
            self._lose(program)
        self._settle(program)

    def dial(self) -> None:
        """The oldest connection that the guest asked for reaches its program, or none listens there."""
        program = self.dialing.pop(0)
        if program.connection.state is not State.DIALING:
            return
        if program.key[0] in self.listening:
            program.connection.accept()
        else:
            self.abandon(program)

    # Host programs.

    def take(self, program: Program, size: int) -> None:
        """The program reads."""
        piece = bytes(program.pending[:size])
        assert piece == pattern(program.taken, len(piece))
        del program.pending[:size]
        program.taken += len(piece)
        self._deliver(program, len(piece))
        self._settle(program)

    def _deliver(self, program: Program, size: int) -> None:
        connection = program.connection
        if not size:
            return
        connection.deliver(size)
        receive = connection.receive
        if receive.window < WINDOW_BYTES and receive.fwd_cnt >= WIDEN_AFTER_BYTES and connection.is_open():
            self.muxer.widen(connection)

    def write(self, program: Program, size: int) -> None:
        if not program.has_ended:
            program.written += size

    def end(self, program: Program) -> None:
        """SHUT_WR."""
        program.has_ended = True

    def close(self, program: Program) -> None:
        program.has_ended = program.is_closed = True
        self._lose(program)
        self._settle(program)

    def _lose(self, program: Program) -> None:
        """Bytes for a program that is gone."""
        size = len(program.pending)
        program.taken += size
        program.pending.clear()
        self._deliver(program, size)
        if size and program.connection.is_open():
            program.connection.end(pk.SHUTDOWN_RECEIVE)

    def abandon(self, program: Program) -> None:
        """The program reset its connection, or the device gave it up."""
        self.muxer.abandon(program.connection)
        program.pending.clear()
        self._settle(program)

    def _settle(self, program: Program) -> None:
        """After the last byte follows what was to follow it."""
        if program.pending:
            return
        state = program.connection.state
        if state in {State.GONE, State.CLOSING}:
            self.muxer.dismiss(program.connection)
        if state is State.GONE:
            self.programs.pop(program.connection, None)
        if state is State.GONE or program.ends_after_pending:
            program.is_ended_by_guest = True

    def owes(self, host_port: int, guest_port: int) -> bool:
        """Whether a packet for these ports is on its way to the guest, or may still be sent."""
        packets = [*self.muxer.strays, *(header for header, _ in self.wire)]
        if any((header.src_port, header.dst_port) == (host_port, guest_port) for header in packets):
            return True
        programs = [program for program in self.programs.values() if program.key == (host_port, guest_port)]
        return any(program.connection.state not in {State.CLOSING, State.GONE} for program in programs)

    # To the guest.

    def send(self, program: Program | None, size: int) -> bool:
        """Puts the next packet on the wire: an RST that waits, or one of a program's; False when there is none."""
        if self.muxer.strays:
            self.wire.append((self.muxer.next_stray(), b""))
            return True
        if program is None:
            return False
        connection = program.connection
        # What a program wrote before a guest that reads no more was known to it is lost, and keeps no end back.
        is_all_sent = program.sent == program.written or not connection.is_flowing()
        if program.has_ended and is_all_sent and connection.is_open() and not connection.has_packet():
            connection.end(pk.SHUTDOWN_BOTH if program.is_closed else pk.SHUTDOWN_SEND)
            self._settle(program)
        if connection.has_packet():
            self.wire.append((connection.next_packet(), b""))
            return True
        size = min(size, program.written - program.sent, MAX_PACKET_BYTES)
        if not connection.is_flowing() or not (size := min(size, connection.send.free())):
            return False
        header = pk.decode_header(connection.encode_data_header(size))
        connection.send.spend(size)
        self.wire.append((header, pattern(program.sent, size)))
        program.sent += size
        return True
