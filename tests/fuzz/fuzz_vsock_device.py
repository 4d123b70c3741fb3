"""Fuzzes the vsock device: packets, buffers, ring words, features, set-ups and vhost-user messages, against all of it.

The device runs inside this process and is stepped by hand, so a case is quick and a failure has a traceback. Each case
plays random turns of a guest, of host programs and of a front-end; afterwards the books must balance, and after a
driver reset the device must work as new. Longer than under pytest:
python -m tests.fuzz.fuzz_vsock_device --cases 100000 --seed 1
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.vsock_front_end import FrontEndTurns, SteppedFrontEnd, open_files
from tests.vmkit.vsock import fake_driver as fd
from vmkit.vsock import packet as pk
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.backend import VhostUserBackend
from vmkit.vsock.connection import State
from vmkit.vsock.muxer import STRAY_RESETS_CEILING
from vmkit.vsock.notices import Notices

TURNS_PER_CASE = 60
HOST_PORTS = (600, 601, 700)  # nobody listens at 700
GUEST_PORTS = (9001, 9002, 9003)
MAX_CONNECTIONS = 12
RX_CUTS = (
    (fd.RX_SINGLE,),
    (fd.RX_SPLIT,),
    (fd.RX_ODD,),
    (fd.RX_HEADER,),
    (fd.RX_HEADER, fd.RX_SINGLE),
    (fd.RX_ODD, fd.RX_HEADER_SPLIT, fd.RX_HEADER),
)


class World(FrontEndTurns):
    """The device, a fake guest, and host programs, all in this process."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.rng = rng
        self.weights = rng.choice((GUEST_WEIGHTS, FRONT_WEIGHTS))
        self.uds_path = str(directory / "v")
        self.lines: list[str] = []
        self.listeners = [self._listen(self.uds_path)]
        self.listeners += [self._listen(f"{self.uds_path}_{port}") for port in HOST_PORTS[:2]]
        self.programs: list[socket.socket] = []
        front, back = socket.socketpair()
        self.backend = VhostUserBackend(
            back,
            self.listeners.pop(0),
            self.uds_path,
            fd.GUEST_CID,
            Notices("", self.lines.append),
            privileged_ports=(601,),
            max_connections=MAX_CONNECTIONS,
        )
        features = rng.choice((fd.ALL_FEATURES, fd.ALL_FEATURES & ~fd.F_EVENT_IDX, fd.ALL_FEATURES & ~fd.F_INDIRECT))
        has_tables = bool(features & fd.F_INDIRECT)
        self.driver = fd.FakeDriver(
            front,
            features=features,
            rx_cuts=rng.choice(RX_CUTS),
            rx_buffers=rng.choice((1, 5, 20)),
            is_rx_indirect=has_tables and rng.random() < 0.3,
            tx_cut=rng.choice(((44,), (1, 43, 7), (100, 5))),
            is_tx_indirect=has_tables and rng.random() < 0.3,
            buf_alloc=rng.choice((262144, 1000)),
        )
        self.front = self.driver.front = SteppedFrontEnd(front, self.backend)
        self.files = open_files(self.driver)
        self.driver.boot()
        for port in GUEST_PORTS[:2]:
            self.driver.listen(port)

    @staticmethod
    def _listen(path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def step(self) -> None:
        """Lets the device do what there is to do."""
        for ring in (self.driver.rx, self.driver.tx):
            os.eventfd_write(ring.kick_fd, 1)
        self.driver.sync()
        self.driver.sync()

    # Turns.

    def turn(self) -> None:
        play = self.rng.choices(TURNS, self.weights)[0]
        play(self)
        for link in self.backend._host._links.values():
            # Small sockets, so that bytes stay with the device.
            if link.sock is not None:
                link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        if self.rng.random() < 0.7:
            self.step()
        if self.rng.random() < 0.7:
            self.poll_guest()

    def poll_guest(self) -> None:
        """The driver may find nonsense in a ring that a case has broken; that is its own fault."""
        with contextlib.suppress(KeyError, IndexError, struct.error, AssertionError):
            self.driver.poll()

    def guest_packet(self) -> None:
        """A packet that is right in most fields."""
        rng, driver = self.rng, self.driver
        sockets = list(driver.sockets.values())
        if sockets and rng.random() < 0.8:
            sock = rng.choice(sockets)
            host_port, guest_port, fwd_cnt = sock.host_port, sock.guest_port, sock.fwd_cnt
        else:
            host_port, guest_port, fwd_cnt = rng.choice(HOST_PORTS), rng.choice((500, 2000, 9001)), 0
        payload = rng.randbytes(rng.choice((0, 0, 1, 100, 5000)))
        header = driver.header(host_port, guest_port, rng.choice((1, 2, 3, 4, 5, 5, 5, 6, 7, 0, 200)))
        header = header._replace(length=len(payload), fwd_cnt=fwd_cnt & 0xFFFFFFFF, flags=rng.choice((0, 1, 2, 3)))
        if rng.random() < 0.2:
            field = rng.choice(pk.Header._fields)
            limit = 16 if field in {"type", "op"} else 64 if field.endswith("cid") else 32
            value = rng.choice((0, 1, 2, 3, rng.getrandbits(limit), 2**limit - 1))
            header = header._replace(**{field: value})
        with contextlib.suppress(IndexError):
            driver.send_packet(header, payload)

    def guest_random_packet(self) -> None:
        with contextlib.suppress(IndexError):
            self.driver.send_packet(
                pk.decode_header(self.rng.randbytes(44)), self.rng.randbytes(self.rng.randrange(64))
            )

    def guest_socket(self) -> None:
        """What a guest's program would do."""
        rng = self.rng
        sockets = list(self.driver.sockets.values())
        with contextlib.suppress(IndexError):
            if not sockets or rng.random() < 0.3:
                self.driver.dial(rng.choice(HOST_PORTS), source_port=rng.choice((None, 800 + rng.randrange(100))))
                return
            sock = rng.choice(sockets)
            match rng.randrange(5):
                case 0:
                    sock.shutdown(rng.choice((1, 2, 3)))
                case 1:
                    sock.is_reading = not sock.is_reading
                case 2:
                    sock.read()
                case _:
                    sock.send(rng.randbytes(rng.choice((1, 100, 3000, 70000))))

    def host_connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.connect(self.uds_path)
            line = self.rng.choice(
                (b"CONNECT 9001\n", b"CONNECT 9002\nhello", b"CONNECT 9003\n", b"CONN", b"no\n", b"")
            )
            sock.send(line)
        self.programs.append(sock)

    def host_accept(self) -> None:
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                sock, _ = listener.accept()
                sock.setblocking(False)
                self.programs.append(sock)

    def host_program(self) -> None:
        if not self.programs:
            return
        rng = self.rng
        sock = rng.choice(self.programs)
        with contextlib.suppress(OSError):
            match rng.randrange(6):
                case 0:
                    self.programs.remove(sock)
                    sock.close()
                case 1:
                    sock.shutdown(rng.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
                case 2 | 3:
                    sock.recv(rng.choice((1, 1000, 300_000)))
                case _:
                    sock.send(rng.randbytes(rng.choice((1, 100, 5000, 100_000))))

    def ring_chain(self) -> None:
        """A few descriptors of nearly right kinds, offered on either ring."""
        rng = self.rng
        ring = rng.choice((self.driver.tx, self.driver.rx))
        good = (fd.HIGH_START + rng.randrange(fd.RAM_BYTES - fd.HIGH_START), fd.HIGH_START, 0x1000)
        for _ in range(rng.randrange(1, 4)):
            address = rng.choice((*good, fd.LOW_END - 4, fd.RAM_BYTES - 1, rng.getrandbits(64)))
            length = rng.choice((0, 1, 16, 44, 48, 64, 5000, 2**32 - 1, rng.getrandbits(32)))
            flags = rng.choice((0, 0, 1, 2, 3, 4, 5, 6, rng.getrandbits(16)))
            ring.write_desc(
                rng.randrange(8), address, length, flags, rng.choice((0, 1, 7, 127, 128, rng.getrandbits(16)))
            )
        for _ in range(rng.randrange(1, 3)):
            ring.offer(rng.choice((0, 1, 7, rng.randrange(ring.size), rng.getrandbits(16))))

    def ring_table(self) -> None:
        """An indirect table of nearly right descriptors, offered on either ring."""
        rng = self.rng
        ring = rng.choice((self.driver.tx, self.driver.rx))
        flag = fd.WRITE if ring is self.driver.rx else 0
        area = fd.RAM_BYTES - 0x10000
        count = rng.choice((1, 2, 5, 44, ring.size))
        for i in range(count):
            flags = flag | fd.NEXT if i + 1 < count else flag
            following = i + 1
            if rng.random() < 1 / count:
                flags = rng.choice((flags, flags, flags ^ fd.NEXT, flags ^ fd.WRITE, flags | fd.INDIRECT))
                following = rng.choice((i + 1, i, 0, count, 0xFFFF))
            length = rng.choice((0, 1, 1, 44, 4000, 2**32 - 1 if rng.random() < 0.1 else 1))
            entry = struct.pack("<QIHH", area + 0x4000 + i, length, flags, following)
            self.driver.ram.write(area + 16 * i, entry)
        length = rng.choice((16 * count, 16 * count, 16 * count + 1, 16 * (ring.size + 1), 0))
        ring.write_desc(0, area, length, fd.INDIRECT, 0)
        ring.offer(0)

    def ring_word(self) -> None:
        """Any word of either ring, or its index."""
        rng = self.rng
        ring = rng.choice((self.driver.tx, self.driver.rx))
        if rng.random() < 0.5:
            ring.set_avail_idx(
                (ring.avail_idx + rng.choice((1, 5, ring.size, ring.size + 1, rng.getrandbits(16)))) & 0xFFFF
            )
        else:
            start, size = rng.choice(
                ((ring.desc, 16 * ring.size), (ring.avail, 6 + 2 * ring.size), (ring.used, 6 + 8 * ring.size))
            )
            self.driver.ram.write(start + rng.randrange(size - 2), rng.randbytes(2))

    def pause(self) -> None:
        bases = self.driver.stop()
        if self.rng.random() < 0.5:
            self.host_program()
        self.driver.start(bases)

    def reboot(self) -> None:
        self.driver.reboot()
        for port in GUEST_PORTS[:2]:
            self.driver.listen(port)

    def let_time_pass(self) -> None:
        """What the passing of time leads to, without waiting for it."""
        later_s = time.monotonic() + self.rng.choice((0.1, 3, 9, 20))
        self.backend._host.expire(later_s)
        for _ in range(3):
            self.backend._traffic.probe_starved()
        if self.rng.random() < 0.2:
            self.backend._note_signal(self.rng.choice((signal.SIGHUP, signal.SIGUSR1)), None)

    def new_memory(self) -> None:
        table = self.driver.memory_table()
        self.driver.front.ask_u64(vu.SET_MEM_TABLE, table, (self.driver.ram.fd,) * 2, flags=9)

    # What must hold.

    def check_books(self) -> None:
        muxer = self.backend._muxer
        assert muxer.member_count <= MAX_CONNECTIONS
        assert len(muxer.strays) <= STRAY_RESETS_CEILING
        for connection in muxer.connections():
            receive, link = connection.receive, self.backend._traffic.links.get(connection)
            assert 0 <= receive.pending <= receive.window
            assert link is not None
            if connection.state is State.OPEN:
                assert link.sock is not None and link.pending_bytes == receive.pending
            assert not link._views
        sockets = {link.sock for link in self.backend._host._links.values()}
        assert None not in sockets and len(sockets) <= MAX_CONNECTIONS
        assert all(link.connection in muxer._members for link in self.backend._host._links.values())

    def check_works_as_new(self) -> None:
        """After a reset, and with all programs gone, a byte goes around and nothing is left over."""
        for sock in self.programs:
            sock.close()
        self.programs.clear()
        self.reboot()
        for _ in range(2 * MAX_CONNECTIONS):
            self.host_accept()
            for sock in self.programs:
                sock.close()
            self.programs.clear()
            self.step()
            self.driver.poll()
        assert not self.backend._muxer.connections(), self.backend._muxer.connections()
        assert not self.backend._traffic.links, self.backend._traffic.links
        self.host_connect_to(9001)
        deadline = time.monotonic() + 10
        while not self.driver.listening[9001]:
            assert time.monotonic() < deadline, "no connection after a reset"
            self.step()
            self.driver.poll()
        guest = self.driver.listening[9001].pop()
        guest.send(b"canary")
        seen = b""
        while not seen.endswith(b"canary"):
            assert time.monotonic() < deadline, "no bytes after a reset"
            self.step()
            self.driver.poll()
            with contextlib.suppress(BlockingIOError):
                seen += self.programs[0].recv(100)

    def host_connect_to(self, port: int) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.uds_path)
        sock.setblocking(False)
        sock.send(b"CONNECT %d\n" % port)
        self.programs.append(sock)

    def close(self) -> None:
        for sock in (*self.programs, *self.listeners):
            sock.close()
        for number in self.files:
            os.close(number)
        self.driver.close()
        self.backend.step()
        assert self.backend.is_finished() or self.backend._muxer.member_count
        self.backend.close()


TURNS = (
    World.guest_packet,
    World.guest_random_packet,
    World.guest_socket,
    World.host_connect,
    World.host_accept,
    World.host_program,
    World.ring_chain,
    World.ring_table,
    World.ring_word,
    World.pause,
    World.reboot,
    World.new_memory,
    World.let_time_pass,
    World.features,
    World.ring_setup,
    World.descriptors,
    World.memory,
    World.message,
)
GUEST_WEIGHTS = (12, 2, 12, 5, 6, 10, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
# A case in which the rings hardly ever run would try little else.
FRONT_WEIGHTS = (12, 2, 12, 5, 6, 10, 1, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 2)


@contextlib.contextmanager
def open_world(rng: random.Random) -> Iterator[World]:
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    world = World(directory, rng)
    try:
        yield world
    finally:
        world.close()
        shutil.rmtree(directory)


def run_case(seed: int) -> None:
    """One case; everything in it follows from the seed."""
    rng = random.Random(seed)
    with open_world(rng) as world:
        for _ in range(TURNS_PER_CASE):
            world.turn()
            world.check_books()
        world.check_works_as_new()


def main() -> int:
    """Runs many cases; prints the seed of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; each case counts one up")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.cases):
        try:
            run_case(seed)
        except BaseException:
            print(f"failed with --seed {seed} --cases 1", file=sys.stderr)
            raise
    print(f"{options.cases} cases passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
