"""A guest without a machine: vhost-user front-end, virtio driver and a small vsock stack, against the real device.

It says what QEMU says, in QEMU's order, over a socketpair; its RAM is a memfd and its interrupts are eventfds. It lets
a test cut buffers, forge packets and break rings as no kernel would.
"""

import itertools
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vmkit.vsock import packet as pk
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.packet import Header

RAM_BYTES = 24 * 1024 * 1024
# The hole at 640 KiB, as QEMU's q35 has it, so that there are two regions in one file.
LOW_END = 0xA0000
HIGH_START = 0xC0000
FRONT_BASE = 0x7F5500000000
RING_SIZE = 128

F_INDIRECT = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL = 1 << 30
F_VERSION_1 = 1 << 32
ALL_FEATURES = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1

NEXT, WRITE, INDIRECT = 1, 2, 4

# How each rx buffer is cut: sizes of its descriptors.
RX_SINGLE = (3776,)
RX_SPLIT = (44, 4096)
RX_ODD = (7, 30, 100, 1, 900)
# Room for a header alone, in one piece and in two.
RX_HEADER = (44,)
RX_HEADER_SPLIT = (40, 4)

GUEST_CID = 3
WAIT_S = 20.0


class Ram:
    """Guest memory with an allocator that only grows."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fake-guest")
        os.ftruncate(self.fd, RAM_BYTES)
        self.map = mmap.mmap(self.fd, RAM_BYTES)
        self._next = HIGH_START

    def allocate(self, size: int, align: int = 16) -> int:
        address = -(-self._next // align) * align
        self._next = address + size
        assert self._next <= RAM_BYTES, "the fake guest has no RAM left"
        return address

    def write(self, address: int, data: bytes) -> None:
        self.map[address : address + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        return self.map[address : address + size]

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class DriverRing:
    """The driver's half of a split ring."""

    def __init__(self, ram: Ram, *, has_event_idx: bool, size: int = RING_SIZE) -> None:
        self.ram = ram
        self.size = size
        self.has_event_idx = has_event_idx
        self.desc = ram.allocate(16 * size)
        self.avail = ram.allocate(6 + 2 * size, 2)
        self.used = ram.allocate(6 + 8 * size, 4)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        self.interrupts = 0
        self.reset()

    def reset(self) -> None:
        self.ram.write(self.desc, bytes(16 * self.size))
        self.ram.write(self.avail, bytes(6 + 2 * self.size))
        self.ram.write(self.used, bytes(6 + 8 * self.size))
        self.free = list(range(self.size))
        self.owned: dict[int, list[int]] = {}
        self.avail_idx = 0
        self.last_used = 0
        self.kicked_idx = 0

    def write_desc(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        self.ram.write(self.desc + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def add(self, pieces: list[tuple[int, int]], *, is_writable: bool, table: int | None = None) -> int:
        """Offers one chain of (address, length) pieces, through an indirect table at `table` when given."""
        flag = WRITE if is_writable else 0
        if table is not None:
            for i, (address, length) in enumerate(pieces):
                more = NEXT if i + 1 < len(pieces) else 0
                self.ram.write(table + 16 * i, struct.pack("<QIHH", address, length, flag | more, i + 1))
            heads = [self.free.pop(0)]
            self.write_desc(heads[0], table, 16 * len(pieces), INDIRECT, 0)
        else:
            heads = [self.free.pop(0) for _ in pieces]
            for i, (address, length) in enumerate(pieces):
                more = NEXT if i + 1 < len(pieces) else 0
                self.write_desc(heads[i], address, length, flag | more, heads[i + 1] if more else 0)
        self.owned[heads[0]] = heads
        self.offer(heads[0])
        return heads[0]

    def offer(self, head: int) -> None:
        """Puts a head into the available ring, whatever it is."""
        self.ram.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head & 0xFFFF))
        self.set_avail_idx((self.avail_idx + 1) & 0xFFFF)

    def set_avail_idx(self, idx: int) -> None:
        self.avail_idx = idx
        self.ram.write(self.avail + 2, struct.pack("<H", idx))

    def kick(self, *, is_forced: bool = False) -> None:
        """Kicks if the device wants it."""
        if self.has_event_idx:
            event = struct.unpack("<H", self.ram.read(self.used + 4 + 8 * self.size, 2))[0]
            wants = (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - self.kicked_idx) & 0xFFFF
        else:
            wants = not self.ram.read(self.used, 1)[0] & 1
        self.kicked_idx = self.avail_idx
        if wants or is_forced:
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)

    def take_used(self) -> list[tuple[int, int]]:
        """Heads and written sizes that came back; asks for the next interrupt and looks once more."""
        taken = []
        while True:
            idx = struct.unpack("<H", self.ram.read(self.used + 2, 2))[0]
            while self.last_used != idx:
                slot = self.used + 4 + 8 * (self.last_used % self.size)
                head, written = struct.unpack("<II", self.ram.read(slot, 8))
                self.last_used = (self.last_used + 1) & 0xFFFF
                self.free += self.owned.pop(head, [])
                taken.append((head, written))
            if self.has_event_idx:
                self.ram.write(self.avail + 4 + 2 * self.size, struct.pack("<H", self.last_used))
            if struct.unpack("<H", self.ram.read(self.used + 2, 2))[0] == self.last_used:
                return taken

    def drain_call(self) -> None:
        try:
            os.eventfd_read(self.call_fd)
            self.interrupts += 1
        except BlockingIOError:
            pass

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class FrontEnd:
    """QEMU's side of the vhost-user socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(WAIT_S)

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1) -> None:
        data = vu.HEADER.pack(request, flags, len(payload)) + payload
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.sendall(data)

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1) -> bytes:
        self.send(request, payload, fds, flags)
        reply, reply_flags, size = vu.HEADER.unpack(self._read(vu.HEADER.size))
        assert (reply, reply_flags) == (request, 5)
        return self._read(size)

    def ask_u64(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1) -> int:
        return int(struct.unpack("<Q", self.ask(request, payload, fds, flags))[0])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            assert more, "the device left"
            data += more
        return data


class FakeDriver:
    """The whole guest. `sockets` is its vsock stack; packets for no socket are answered with RST, as Linux does."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        features: int = ALL_FEATURES,
        rx_cut: tuple[int, ...] = RX_SINGLE,
        rx_cuts: tuple[tuple[int, ...], ...] = (),
        rx_buffers: int = 100,
        is_rx_indirect: bool = False,
        tx_cut: tuple[int, ...] = (44,),
        is_tx_indirect: bool = False,
        buf_alloc: int = 262144,
    ) -> None:
        self.front = FrontEnd(sock)
        self.features = features
        # One cut for every buffer, or several in turn.
        cuts = list(itertools.islice(itertools.cycle(rx_cuts or (rx_cut,)), rx_buffers))
        self.is_rx_indirect = is_rx_indirect
        self.tx_cut = tx_cut
        self.is_tx_indirect = is_tx_indirect
        self.buf_alloc = buf_alloc
        self.ram = Ram()
        has_event_idx = bool(features & F_EVENT_IDX)
        self.rx = DriverRing(self.ram, has_event_idx=has_event_idx)
        self.tx = DriverRing(self.ram, has_event_idx=has_event_idx)
        self.rx_pieces: dict[int, list[tuple[int, int]]] = {}
        self.tx_backlog: deque[tuple[Header, bytes]] = deque()
        self.received: list[Header] = []
        self.is_stack_on = True
        self.is_refilling = True
        self.listening: dict[int, list[GuestSocket]] = {}
        self.sockets: dict[tuple[int, int], GuestSocket] = {}
        self.next_port = 5000
        self.watched: list[Any] = []
        self._rx_areas = [ram_area(self.ram, cut) for cut in cuts]
        self._rx_tables = [self.ram.allocate(16 * len(cut)) for cut in cuts]
        self._tx_areas = [self.ram.allocate(66000) for _ in range(RING_SIZE)]
        self._tx_tables = [self.ram.allocate(16 * 64) for _ in range(RING_SIZE)]

    # vhost-user, in QEMU 7.2's order.

    def connect(self) -> None:
        front = self.front
        assert front.ask_u64(vu.GET_FEATURES) & self.features == self.features
        offered = front.ask_u64(vu.GET_PROTOCOL_FEATURES)
        front.send(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", offered & 0x208))
        front.send(vu.SET_OWNER)
        front.ask_u64(vu.GET_FEATURES)
        for index, ring in enumerate((self.rx, self.tx)):
            front.send(vu.SET_VRING_CALL, struct.pack("<Q", index), (ring.call_fd,))
            front.send(vu.SET_VRING_ERR, struct.pack("<Q", index), (ring.err_fd,))
        config = front.ask(vu.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
        assert struct.unpack("<IIIQ", config) == (0, 8, 0, GUEST_CID)

    def memory_table(self) -> bytes:
        regions = [(0, LOW_END, FRONT_BASE, 0)]
        regions.append((HIGH_START, RAM_BYTES - HIGH_START, FRONT_BASE + HIGH_START, HIGH_START))
        return struct.pack("<II", 2, 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)

    def start(self, bases: tuple[int, int] = (0, 0)) -> None:
        front = self.front
        front.send(vu.SET_FEATURES, struct.pack("<Q", self.features))
        assert front.ask_u64(vu.SET_MEM_TABLE, self.memory_table(), (self.ram.fd, self.ram.fd), flags=9) == 0
        for index, ring in enumerate((self.rx, self.tx)):
            front.send(vu.SET_VRING_NUM, struct.pack("<II", index, ring.size))
            front.send(vu.SET_VRING_BASE, struct.pack("<II", index, bases[index]))
            addresses = (FRONT_BASE + ring.desc, FRONT_BASE + ring.used, FRONT_BASE + ring.avail)
            front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *addresses, 0))
            front.send(vu.SET_VRING_KICK, struct.pack("<Q", index), (ring.kick_fd,))
        for index in (0, 1):
            front.send(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        for index, ring in enumerate((self.rx, self.tx)):
            front.send(vu.SET_VRING_CALL, struct.pack("<Q", index), (ring.call_fd,))
        self.sync()
        self.refill()

    def stop(self) -> tuple[int, int]:
        for index in (0, 1):
            self.front.send(vu.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        bases = []
        for index in (0, 1):
            reply = self.front.ask(vu.GET_VRING_BASE, struct.pack("<II", index, 0))
            bases.append(struct.unpack("<II", reply)[1])
        return bases[0], bases[1]

    def sync(self) -> None:
        """Returns when the device has taken a turn after all that was said before: it takes one message in each."""
        self.front.ask_u64(vu.GET_FEATURES)

    def boot(self) -> None:
        self.connect()
        self.start()

    def reboot(self) -> None:
        """A guest reset under the device: new rings, empty stack."""
        self.stop()
        self.forget_rings()
        self.start()

    def forget_rings(self) -> None:
        """What a reset of the guest takes with it."""
        for ring in (self.rx, self.tx):
            ring.reset()
        self.rx_pieces.clear()
        self.tx_backlog.clear()
        self.sockets.clear()
        self.listening.clear()

    # Rings.

    def refill(self) -> None:
        """Offers all rx buffers that the device does not have."""
        if not self.is_refilling:
            return
        busy = {pieces[0][0] for pieces in self.rx_pieces.values()}
        for pieces, table in zip(self._rx_areas, self._rx_tables, strict=True):
            needed = 1 if self.is_rx_indirect else len(pieces)
            if pieces[0][0] in busy or len(self.rx.free) < needed:
                continue
            head = self.rx.add(pieces, is_writable=True, table=table if self.is_rx_indirect else None)
            self.rx_pieces[head] = pieces
        self.rx.kick()

    def send_packet(self, header: Header, payload: bytes = b"") -> None:
        """Queues one packet, goes out as soon as the ring has room."""
        self.tx_backlog.append((header, payload))
        self.flush()

    def flush(self) -> None:
        self.tx.take_used()
        while self.tx_backlog:
            header, payload = self.tx_backlog[0]
            data = header.encode() + payload
            cuts = cut_sizes(len(data), self.tx_cut)
            if len(self.tx.free) < len(cuts):
                break
            self.tx_backlog.popleft()
            slot = self.tx.free[0]
            pieces, address = [], self._tx_areas[slot]
            self.ram.write(address, data)
            for size in cuts:
                pieces.append((address, size))
                address += size
            self.tx.add(pieces, is_writable=False, table=self._tx_tables[slot] if self.is_tx_indirect else None)
        self.tx.kick()

    def poll(self) -> None:
        """Takes what the device gave back and lets the stack answer."""
        for ring in (self.rx, self.tx):
            ring.drain_call()
        for head, written in self.rx.take_used():
            data = b""
            for address, size in self.rx_pieces.pop(head):
                data += self.ram.read(address, min(size, written - len(data)))
            header = pk.decode_header(data)
            assert len(data) == written >= pk.HEADER_SIZE
            assert written == pk.HEADER_SIZE + (header.length if header.op == pk.OP_RW else 0)
            self.received.append(header)
            if self.is_stack_on:
                self._take(header, data[pk.HEADER_SIZE :])
        self.refill()
        self.flush()

    def wait(self, is_done: Callable[[], object], *, timeout_s: float = WAIT_S, what: str = "") -> None:
        """Runs the guest until is_done()."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            left = deadline - time.monotonic()
            assert left > 0, f"waited too long {what}: last packets {self.received[-5:]}"
            reading = [self.rx.call_fd, self.tx.call_fd, *self.watched]
            select.select(reading, [], [], min(left, 0.02))
            self.poll()

    # The vsock stack.

    def header(self, host_port: int, guest_port: int, op: int, **fields: int) -> Header:
        base = Header(GUEST_CID, 2, guest_port, host_port, 0, pk.TYPE_STREAM, op, 0, self.buf_alloc, 0)
        return base._replace(**fields)

    def listen(self, port: int) -> None:
        self.listening[port] = []

    def accept(self, port: int) -> "GuestSocket":
        self.wait(lambda: self.listening[port], what=f"for a connection to guest port {port}")
        return self.listening[port].pop(0)

    def dial(self, host_port: int, *, source_port: int | None = None) -> "GuestSocket":
        """Sends a REQUEST; `is_open` or `is_reset` tells the outcome."""
        if source_port is None:
            self.next_port += 1
            source_port = self.next_port
        sock = GuestSocket(self, host_port, source_port)
        self.sockets[(host_port, source_port)] = sock
        sock.say(pk.OP_REQUEST)
        return sock

    def _take(self, header: Header, payload: bytes) -> None:
        assert (header.src_cid, header.type) == (2, pk.TYPE_STREAM) or header.op == pk.OP_RST, header
        key = (header.src_port, header.dst_port)
        sock = self.sockets.get(key)
        if sock is not None:
            sock.take(header, payload)
        elif header.op == pk.OP_REQUEST and header.dst_port in self.listening:
            sock = GuestSocket(self, header.src_port, header.dst_port)
            sock.update(header)
            self.sockets[key] = sock
            sock.is_open = True
            sock.say(pk.OP_RESPONSE)
            self.listening[header.dst_port].append(sock)
        elif header.op != pk.OP_RST:
            self.send_packet(self.header(header.src_port, header.dst_port, pk.OP_RST))

    def close(self) -> None:
        self.front.sock.close()
        self.rx.close()
        self.tx.close()
        self.ram.close()


class GuestSocket:
    """A guest program's socket, with Linux's manners."""

    def __init__(self, driver: FakeDriver, host_port: int, guest_port: int) -> None:
        self.driver = driver
        self.host_port = host_port
        self.guest_port = guest_port
        self.is_open = False
        self.is_reset = False
        self.is_reading = True
        self.heard = 0
        self.unread = b""
        self.data = bytearray()
        self.outbox = bytearray()
        self.ends_after_outbox = 0
        self.sent = 0
        self.fwd_cnt = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.responses = 0

    def say(self, op: int, payload: bytes = b"", **fields: int) -> None:
        fields.setdefault("length", len(payload))
        fields.setdefault("fwd_cnt", self.fwd_cnt & 0xFFFFFFFF)
        self.driver.send_packet(self.driver.header(self.host_port, self.guest_port, op, **fields), payload)

    def update(self, header: Header) -> None:
        self.peer_buf_alloc = header.buf_alloc
        self.peer_fwd_cnt = header.fwd_cnt

    @property
    def credit(self) -> int:
        window = min(self.peer_buf_alloc, self.driver.buf_alloc)
        return max(0, window - ((self.sent - self.peer_fwd_cnt) & 0xFFFFFFFF))

    def send(self, data: bytes) -> None:
        """Sends as the credit allows, the rest later."""
        self.outbox += data
        self._push()

    def shutdown(self, flags: int) -> None:
        """SHUTDOWN, after all that was sent."""
        self.ends_after_outbox |= flags
        self._push()

    def close(self) -> None:
        self.shutdown(pk.SHUTDOWN_BOTH)

    def read(self) -> None:
        """Takes what came in while is_reading was off."""
        self.fwd_cnt += len(self.unread)
        self.data += self.unread
        self.unread = b""
        self.say(pk.OP_CREDIT_UPDATE)

    @property
    def is_ended(self) -> bool:
        """Whether the host will send no more, or is gone."""
        return self.is_reset or bool(self.heard & pk.SHUTDOWN_SEND)

    def _push(self) -> None:
        while self.outbox and self.is_open and not self.is_reset and (room := min(self.credit, 65536)):
            chunk = bytes(self.outbox[:room])
            del self.outbox[: len(chunk)]
            self.sent += len(chunk)
            self.say(pk.OP_RW, chunk)
        if self.ends_after_outbox and not self.outbox and not self.is_reset:
            self.say(pk.OP_SHUTDOWN, flags=self.ends_after_outbox)
            self.ends_after_outbox = 0

    def take(self, header: Header, payload: bytes) -> None:
        self.update(header)
        match header.op:
            case pk.OP_RESPONSE:
                self.is_open = True
                self.responses += 1
            case pk.OP_RST:
                self.is_reset = True
                self.is_open = False
                self.driver.sockets.pop((self.host_port, self.guest_port), None)
            case pk.OP_RW:
                self.unread += payload
                if self.is_reading:
                    self.read()
            case pk.OP_SHUTDOWN:
                self.heard |= header.flags
                if self.heard == pk.SHUTDOWN_BOTH and not self.unread:
                    self.say(pk.OP_RST)
                    self.is_reset = True
                    self.driver.sockets.pop((self.host_port, self.guest_port), None)
            case pk.OP_CREDIT_REQUEST:
                self.say(pk.OP_CREDIT_UPDATE)
        self._push()


def ram_area(ram: Ram, cut: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pieces of RAM of these sizes, not next to each other."""
    return [(ram.allocate(size + 16), size) for size in cut]


def cut_sizes(total: int, cut: tuple[int, ...]) -> list[int]:
    """`total` bytes cut into the given sizes, and the rest into one more piece."""
    sizes = []
    for size in cut:
        if total <= 0:
            break
        sizes.append(min(size, total))
        total -= sizes[-1]
    if total > 0:
        sizes.append(total)
    return sizes
