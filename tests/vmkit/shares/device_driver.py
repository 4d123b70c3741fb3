"""A guest without a machine: QEMU's vhost-user messages, and a virtiofs driver whose requests are the test's own."""

import os
import select
import socket
import struct

from tests.vmkit.vsock.fake_driver import (
    ALL_FEATURES,
    FRONT_BASE,
    HIGH_START,
    LOW_END,
    NEXT,
    RAM_BYTES,
    WAIT_S,
    WRITE,
    DriverRing,
    FrontEnd,
    Ram,
)
from vmkit.vsock import vhost_user as vu

BODY_BYTES = 1 << 20
ROOM_BYTES = BODY_BYTES + 4096
HIPRIO, REQUESTS = 0, 1


class FsDriver:
    """Two rings over one connection."""

    def __init__(self, sock: socket.socket, *, has_event_idx: bool = True) -> None:
        self.front = FrontEnd(sock)
        self._sock = sock
        self._ram = Ram()
        self._features = ALL_FEATURES if has_event_idx else ALL_FEATURES & ~(1 << 29)
        self.rings = [DriverRing(self._ram, has_event_idx=has_event_idx) for _ in range(2)]
        self._request = self._ram.allocate(ROOM_BYTES)
        # By ring and head: where the answers go, and how long those are that came.
        self._places: dict[tuple[int, int], int] = {}
        self._came: dict[tuple[int, int], int] = {}

    def boot(self) -> None:
        """As QEMU sets a device up, and a driver starts it."""
        front = self.front
        features = front.ask_u64(vu.GET_FEATURES)
        assert features & self._features == self._features
        protocol = front.ask_u64(vu.GET_PROTOCOL_FEATURES)
        assert protocol & ~0b1001 == 0
        front.send(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        assert front.ask_u64(vu.GET_QUEUE_NUM) >= 2
        front.send(vu.SET_OWNER)
        front.send(vu.SET_FEATURES, struct.pack("<Q", self._features))
        self.start()

    def start(self) -> None:
        front = self.front
        regions = [(0, LOW_END, FRONT_BASE, 0)]
        regions.append((HIGH_START, RAM_BYTES - HIGH_START, FRONT_BASE + HIGH_START, HIGH_START))
        table = struct.pack("<II", 2, 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)
        assert front.ask_u64(vu.SET_MEM_TABLE, table, (self._ram.fd, self._ram.fd), flags=9) == 0
        for index, ring in enumerate(self.rings):
            front.send(vu.SET_VRING_NUM, struct.pack("<II", index, ring.size))
            front.send(vu.SET_VRING_BASE, struct.pack("<II", index, 0))
            addresses = (FRONT_BASE + ring.desc, FRONT_BASE + ring.used, FRONT_BASE + ring.avail)
            front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *addresses, 0))
            front.send(vu.SET_VRING_CALL, struct.pack("<Q", index), (ring.call_fd,))
            front.send(vu.SET_VRING_KICK, struct.pack("<Q", index), (ring.kick_fd,))
            front.send(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        front.ask_u64(vu.GET_FEATURES)

    def stop(self) -> list[int]:
        """Stops the rings; returns where each stood."""
        replies = [self.front.ask(vu.GET_VRING_BASE, struct.pack("<II", index, 0)) for index in range(2)]
        return [struct.unpack("<II", reply)[1] for reply in replies]

    def submit(self, message: bytes, *, ring: int = REQUESTS, room: int = ROOM_BYTES, table: int | None = None) -> int:
        """Offers one request; returns the head of its chain. table: where an indirect one is written."""
        found = self.rings[ring]
        place = self._ram.allocate(len(message))
        self._ram.write(place, message)
        pieces = [(place, len(message), 0)]
        # The header of an answer, and its body.
        answer = self._ram.allocate(room) if room else 0
        if room:
            pieces += [(answer, 16, WRITE), (answer + 16, room - 16, WRITE)]
        heads = [found.free.pop(0) for _ in pieces]
        for index, (address, length, kind) in enumerate(pieces):
            is_last = index + 1 == len(pieces)
            flags = kind if is_last else kind | NEXT
            if table is None:
                found.write_desc(heads[index], address, length, flags, 0 if is_last else heads[index + 1])
            else:
                self._ram.write(table + 16 * index, struct.pack("<QIHH", address, length, flags, index + 1))
        if table is not None:
            found.write_desc(heads[0], table, 16 * len(pieces), 4, 0)
        found.owned[heads[0]] = heads
        self._places[ring, heads[0]] = answer
        found.offer(heads[0])
        found.kick()
        return heads[0]

    def wait(self, head: int, *, ring: int = REQUESTS) -> bytes:
        """The answer of a request; others come back before it."""
        found = self.rings[ring]
        while True:
            self._came |= {(ring, one): size for one, size in found.take_used()}
            if (ring, head) in self._came:
                return self._ram.read(self._places[ring, head], self._came.pop((ring, head)))
            assert select.select([found.call_fd], [], [], WAIT_S)[0], f"the request {head} has no answer"
            found.drain_call()

    def ask(self, message: bytes) -> bytes:
        """One request and its answer, in memory that is used again."""
        before = self._ram._next
        try:
            return self.wait(self.submit(message))
        finally:
            self._ram._next = before

    def allocate(self, size: int) -> int:
        return self._ram.allocate(size)

    def close(self) -> None:
        self._sock.close()
        for ring in self.rings:
            ring.close()
        self._ram.close()


def make_request(opcode: int, unique: int, body: bytes = b"") -> bytes:
    """One of FUSE's."""
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 1, 0, 0, os.getpid(), 0, 0) + body
