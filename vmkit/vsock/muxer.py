"""All connections of one guest: admits them, gives them ports, and finds the connection of each packet.

Sans-I/O. It knows connections and headers; the driver has sockets, rings and time. Keys are pairs of ports, because
both CIDs are fixed: the host is CID 2, and the guest has the CID of the command line. It refuses all other CIDs.
"""

from collections.abc import Callable, Iterable
from typing import Final

from vmkit.vsock.connection import ConnectionEvent, GuestError, State, VsockConnection
from vmkit.vsock.packet import HOST_CID, OP_REQUEST, OP_RST, TYPE_STREAM, Header, name_op

# Each connection costs one descriptor and, at worst, its window.
MAX_CONNECTIONS: Final = 2048
# One place in so many is never a guest's. Otherwise any program of a guest could lock out the guest's owner, who
# reaches the guest through this device alone.
HOST_SHARE: Final = 16
# What a guest may have on its way to one host program: at first, and once it has sent more than a little. A larger
# window gains nothing; with the first alone a bulk transfer has half the speed (54 and 100 MB/s under TCG).
FIRST_WINDOW_BYTES: Final = 16 * 1024
WINDOW_BYTES: Final = 256 * 1024
# So early that the guest does not wait for the news.
WIDEN_AFTER_BYTES: Final = FIRST_WINDOW_BYTES // 2
# All windows together, of programs that read and of those that do not: the first window for every place, the rest for
# bulk.
WINDOW_BUDGET_BYTES: Final = 64 * 1024 * 1024

# Host ports of connections that host programs ask for: far from any port that a program would choose to listen on.
FIRST_HOST_PORT: Final = 1 << 30
LAST_HOST_PORT: Final = (1 << 31) - 1

# Only root in the guest can bind a source port below this (LAST_RESERVED_PORT, net/vmw_vsock/af_vsock.c).
FIRST_UNPRIVILEGED_PORT: Final = 1024

# RSTs to ports without a connection, waiting for a buffer of the guest. At this mark the driver stops taking the
# guest's packets (virtio 1.2, 5.10.6.4: resources outside the queues may run out, and then the neglected queue comes
# first).
MAX_STRAY_RESETS: Final = 256
# Host programs that come and go cause RSTs too, while a guest that hangs takes none: beyond this they are dropped.
STRAY_RESETS_CEILING: Final = 2 * MAX_CONNECTIONS

Notice = Callable[[str, str], None]


class Muxer:
    """Routes packets to connections.

    Invariant: a connection in the table has ports and is REQUESTED, DIALING, OPEN or CLOSING.
    """

    def __init__(
        self,
        guest_cid: int,
        notice: Notice,
        *,
        privileged_ports: Iterable[int] = (),
        max_connections: int = MAX_CONNECTIONS,
        first_host_port: int = FIRST_HOST_PORT,
    ) -> None:
        self.guest_cid = guest_cid
        self.max_connections = max_connections
        self._notice = notice
        self._privileged_ports = frozenset(privileged_ports)
        self._table: dict[int, VsockConnection] = {}
        # A dict for its order: the longest wait comes first.
        self._members: dict[VsockConnection, None] = {}
        self._guest_ceiling = max_connections - max_connections // HOST_SHARE
        self._wide_count = 0
        spare_bytes = WINDOW_BUDGET_BYTES - max_connections * FIRST_WINDOW_BYTES
        self._max_wide = max(0, spare_bytes // (WINDOW_BYTES - FIRST_WINDOW_BYTES))
        self._next_host_port = first_host_port
        # RSTs that wait to be sent. A dict keeps the order and drops the doubles.
        self.strays: dict[Header, None] = {}

    # Members: everything that costs a descriptor or memory, from the accept of a host program to the last close. What
    # is CLOSING has given both up, and keeps nothing but its ports.

    def admit(self, state: State = State.GREETING) -> VsockConnection | None:
        """Returns a new connection, or None when there are max_connections already. dismiss() frees its place."""
        if self.is_full:
            self._notice("refused-full", f"{self.max_connections} connections are open; a further one was refused")
            return None
        connection = VsockConnection(self.guest_cid, FIRST_WINDOW_BYTES, state)
        self._members[connection] = None
        return connection

    def widen(self, connection: VsockConnection) -> bool:
        """Gives an OPEN connection that carries bulk the full window; False when the budget is used up.

        A fault that holds credit back holds this back, too.
        """
        if self._wide_count >= self._max_wide or connection.receive.is_frozen:
            return False
        self._wide_count += 1
        connection.widen(WINDOW_BYTES)
        return True

    def dismiss(self, connection: VsockConnection) -> None:
        """Frees the place of a connection that is CLOSING or GONE, with its descriptor closed. May be called twice."""
        if connection in self._members:
            del self._members[connection]
            self._wide_count -= connection.receive.window == WINDOW_BYTES

    def connections(self) -> list[VsockConnection]:
        """Returns all members and all CLOSING connections, for the driver's rounds. A copy, so that it may end some."""
        return list(self._members | dict.fromkeys(self._table.values()))

    @property
    def is_full(self) -> bool:
        """Whether all places are taken."""
        return len(self._members) >= self.max_connections

    @property
    def member_count(self) -> int:
        """How many places are taken."""
        return len(self._members)

    # The host's side.

    def request(self, connection: VsockConnection, guest_port: int) -> None:
        """Sends a WAITING connection's REQUEST to the guest, from a host port of its own."""
        connection.guest_port = guest_port
        connection.request(self._take_host_port(guest_port))
        self._table[_key(connection.host_port, guest_port)] = connection

    def withdraw(self, connection: VsockConnection) -> None:
        """Frees the ports of a REQUESTED connection whose driver was reset. It waits for the next driver."""
        self._remove(connection)
        connection.await_driver()

    def abandon(self, connection: VsockConnection) -> None:
        """Ends a connection for a reason of ours or of the host program. A guest that has seen it gets RST."""
        self._remove(connection)
        if connection.abandon():
            self._add_stray(connection.render_header(OP_RST))

    def forget_strays(self) -> None:
        """Drops the waiting RSTs: their driver was reset."""
        self.strays.clear()

    def _take_host_port(self, guest_port: int) -> int:
        """Returns the next port not in use with this guest port. There are a million times more than connections."""
        while True:
            port = self._next_host_port
            self._next_host_port = FIRST_HOST_PORT if port == LAST_HOST_PORT else port + 1
            if _key(port, guest_port) not in self._table:
                return port

    # The guest's side.

    def receive(self, header: Header, payload_size: int) -> tuple[VsockConnection | None, tuple[ConnectionEvent, ...]]:
        """Takes one packet of the guest; returns its connection, if any, and what the driver must do about it.

        payload_size is how many bytes the packet's buffer holds behind the header. The header may claim another size.
        """
        if header.src_cid != self.guest_cid:
            # Not even an RST: its destination would be an address that is not the guest's.
            self._notice("dropped-source", f"{name_op(header.op)} that claims to come from CID {header.src_cid}")
            return None, ()
        if header.dst_cid != HOST_CID:
            return self._refuse(header, "refused-destination", f"{name_op(header.op)} for CID {header.dst_cid}")
        if header.type != TYPE_STREAM:
            return self._refuse(header, "refused-type", f"{name_op(header.op)} of socket type {header.type}")
        connection = self._table.get(header.dst_port << 32 | header.src_port)
        if connection is not None and connection.state is State.CLOSING and header.op == OP_REQUEST:
            # The guest has forgotten the old connection and uses its ports again.
            self._remove(connection)
            connection.abandon()
            connection = None
        if connection is None:
            return self._receive_unknown(header)
        try:
            events = connection.receive_packet(header, payload_size)
        except GuestError as error:
            self._notice("violation", f"guest port {header.src_port}, host port {header.dst_port}: {error}")
            self.abandon(connection)
            return connection, (ConnectionEvent.GONE,)
        if connection.state is State.GONE:
            self._remove(connection)
            if ConnectionEvent.RESET in events:
                self._add_stray(connection.render_header(OP_RST))
        return connection, events

    def _receive_unknown(self, header: Header) -> tuple[VsockConnection | None, tuple[ConnectionEvent, ...]]:
        """Takes a packet for ports that have no connection."""
        if header.op != OP_REQUEST:
            # Usual after a close, while packets were on their way; not worth a line.
            self._add_reply_reset(header)
            return None, ()
        if header.dst_port in self._privileged_ports and header.src_port >= FIRST_UNPRIVILEGED_PORT:
            return self._refuse(
                header,
                "refused-unprivileged",
                f"guest port {header.src_port} may not connect to host port {header.dst_port}",
            )
        if not self.is_full and self.member_count >= self._guest_ceiling:
            text = f"{self.member_count} connections are open, the last places are for host programs"
            return self._refuse(header, "refused-full", text)
        connection = self.admit(State.DIALING)
        if connection is None:
            self._add_reply_reset(header)
            return None, ()
        connection.host_port = header.dst_port
        connection.guest_port = header.src_port
        connection.send.update(header.buf_alloc, header.fwd_cnt)
        self._table[_key(header.dst_port, header.src_port)] = connection
        return connection, (ConnectionEvent.DIAL,)

    def _refuse(self, header: Header, kind: str, text: str) -> tuple[None, tuple[ConnectionEvent, ...]]:
        """Answers with RST, so that the guest's program fails at once instead of after a time-out of 2 s."""
        self._notice(kind, text)
        self._add_reply_reset(header)
        return None, ()

    def _remove(self, connection: VsockConnection) -> None:
        key = _key(connection.host_port, connection.guest_port)
        if self._table.get(key) is connection:
            del self._table[key]

    # RSTs that belong to no connection.

    def _add_reply_reset(self, header: Header) -> None:
        """Queues an RST back to the packet's sender, but never for an RST."""
        if header.op != OP_RST:
            self._add_stray(
                Header(
                    header.dst_cid,
                    header.src_cid,
                    header.dst_port,
                    header.src_port,
                    0,
                    header.type,
                    OP_RST,
                    0,
                    0,
                    0,
                )
            )

    def _add_stray(self, header: Header) -> None:
        if len(self.strays) < STRAY_RESETS_CEILING:
            self.strays[header] = None

    @property
    def is_clogged(self) -> bool:
        """Whether so many RSTs wait that the guest must first give buffers for them."""
        return len(self.strays) >= MAX_STRAY_RESETS

    def next_stray(self) -> Header:
        """Returns the oldest waiting RST. The caller has checked that one waits."""
        header = next(iter(self.strays))
        del self.strays[header]
        return header


def _key(host_port: int, guest_port: int) -> int:
    """Returns both ports as one number. Each packet needs it, and a tuple takes several times as long."""
    return host_port << 32 | guest_port
