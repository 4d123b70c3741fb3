"""The front-end of the device's fuzzer: its turns, most of which a guest decides, also while the rings run."""

import contextlib
import os
import random
import socket
import struct

from tests.vmkit.vsock import fake_driver as fd
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.backend import VhostUserBackend


class SteppedFrontEnd(fd.FrontEnd):
    """A front-end whose device only moves when it waits for a reply."""

    def __init__(self, sock: socket.socket, backend: VhostUserBackend) -> None:
        super().__init__(sock)
        self._backend = backend
        sock.setblocking(False)

    def _read(self, size: int) -> bytes:
        data = b""
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):
                data += self.sock.recv(size - len(data))
            if len(data) == size:
                return data
            self._backend.step()
        raise AssertionError("the device does not answer its front-end")

    def tell(self, request: int, payload: bytes, fds: tuple[int, ...], *, needs_reply: bool) -> None:
        """A message of any kind; the answer, if there is one, is dropped."""
        self.send(request, payload, fds, flags=9 if needs_reply else 1)
        self._backend.step()
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(8192)


def open_files(driver: fd.FakeDriver) -> tuple[int, ...]:
    """Descriptors of every kind that a message may carry; the caller closes them."""
    eventfds = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    return (*eventfds, os.memfd_create("fuzz"), os.open("/dev/null", os.O_RDONLY), os.dup(driver.ram.fd))


class FrontEndTurns:
    """What a front-end may say: features, set-ups of rings, descriptors, memory, anything."""

    rng: random.Random
    driver: fd.FakeDriver
    front: SteppedFrontEnd
    files: tuple[int, ...]

    def tell(self, request: int, payload: bytes, *fds: int) -> None:
        self.front.tell(request, payload, fds, needs_reply=self.rng.random() < 0.5)

    def features(self) -> None:
        rng = self.rng
        features = rng.choice((0, fd.ALL_FEATURES, self.driver.features, rng.getrandbits(64)))
        if rng.random() < 0.8:
            features |= rng.choice((0, 1 << rng.randrange(64), 1 << 27, 1 << 34))
        self.tell(vu.SET_FEATURES, struct.pack("<Q", features))

    def ring_setup(self) -> None:
        """One word about one ring: its size, base, addresses, or whether it is enabled."""
        rng = self.rng
        index, ring = rng.choice(((0, self.driver.rx), (1, self.driver.tx)))
        match rng.randrange(4):
            case 0:
                size = rng.choice((0, 1, 2, 3, 64, ring.size, 256, 1024, 2048, rng.getrandbits(32)))
                self.tell(vu.SET_VRING_NUM, struct.pack("<II", index, size))
            case 1:
                base = rng.choice((0, 1, ring.avail_idx, 0xFFFF, rng.getrandbits(16), rng.getrandbits(32)))
                self.tell(vu.SET_VRING_BASE, struct.pack("<II", index, base))
            case 2:
                places = [self._choose_place(place) for place in (ring.desc, ring.used, ring.avail)]
                self.tell(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, rng.getrandbits(1), *places, 0))
            case _:
                self.tell(vu.SET_VRING_ENABLE, struct.pack("<II", index, rng.choice((0, 1, 1, 2**32 - 1))))

    def _choose_place(self, right: int) -> int:
        rng = self.rng
        offset = rng.choice((right, right, right + 8, fd.HIGH_START, fd.LOW_END - 16, fd.RAM_BYTES - 64))
        return rng.choice((fd.FRONT_BASE + offset, fd.FRONT_BASE + offset, rng.getrandbits(64)))

    def descriptors(self) -> None:
        """A descriptor of a ring: none, one or several, the right kind or another."""
        rng = self.rng
        request = rng.choice((vu.SET_VRING_KICK, vu.SET_VRING_CALL, vu.SET_VRING_ERR))
        number = rng.choice((0, 1, 2)) | rng.choice((0, 0, 0, 0x100))
        self.tell(request, struct.pack("<Q", number), *rng.sample(self.files, rng.choice((0, 1, 1, 1, 2))))

    def memory(self) -> None:
        """Regions in other places and sizes, as a guest that moves its RAM about makes them."""
        rng = self.rng
        regions = []
        for _ in range(rng.choice((0, 1, 2, 3, 8))):
            start = rng.choice((0, fd.LOW_END, fd.HIGH_START, rng.randrange(fd.RAM_BYTES), rng.getrandbits(64)))
            size = rng.choice((0, 4096, fd.RAM_BYTES - start, rng.getrandbits(64))) & 2**64 - 1
            regions.append((start, size, (fd.FRONT_BASE + start) & 2**64 - 1, rng.choice((start, start, 0))))
        payload = struct.pack("<II", rng.choice((len(regions), len(regions), 9)), 0)
        payload += b"".join(struct.pack("<QQQQ", *region) for region in regions)
        fds = [rng.choice((self.driver.ram.fd,) * 5 + self.files) for _ in regions]
        self.tell(vu.SET_MEM_TABLE, payload, *fds)

    def message(self) -> None:
        """Any whole message."""
        rng = self.rng
        payload = rng.randbytes(rng.choice((0, 1, 4, 7, 8, 12, 39, 40, 4096)))
        if rng.random() < 0.5:
            payload = struct.pack("<I", rng.randrange(3)) + payload[4:]
        fds = rng.sample(self.files, rng.choice((0, 0, 1, 2)))
        known = rng.choice((vu.RESET_DEVICE, vu.RESET_DEVICE, vu.GET_VRING_BASE, vu.GET_CONFIG, rng.randrange(48)))
        self.tell(rng.choice((known, known, known, rng.getrandbits(32))), payload[: vu.MAX_PAYLOAD_BYTES], *fds)
