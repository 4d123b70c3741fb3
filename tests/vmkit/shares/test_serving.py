"""vshd's end and this host's end of a share, joined by a socket; another socket plays /dev/fuse."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.shares.kernel import READ, ROOT, Kernel
from tests.vsh.live import CHECKOUT, DEADLINE_S
from vmkit.shares.server import FuseSpeaker
from vmkit.shares.serving import WAITING_MAX, ShareService
from vshd.flags import Options
from vshd.log import Log
from vshd.services.share import Mounted, open_service
from vshd.services.share_fuse import TOGETHER_MAX, FuseWay
from vshd.services.table import Surroundings
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup
from vshd.wire.requests import Share


class Served:
    """A host that serves a folder, in a thread. `fd` is the guest's end of its connection."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.fd = theirs.detach()
        self.stop, self._stopped = os.pipe()
        self.end = ""
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._ours = ours
        self.serving = ShareService(ours.fileno(), FuseSpeaker(self._folder, is_read_only=False))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.end = self.serving.run(b"", self.stop, lambda: True)
        self._ours.close()

    def tell_to_end(self) -> None:
        os.write(self._stopped, b"x")

    def join(self) -> str:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        for fd in (self._folder, self.stop, self._stopped):
            os.close(fd)
        return self.end


class Guest:
    """vshd's relay in a thread. `device` is the kernel's end of its /dev/fuse."""

    def __init__(self, fd: int, *waiting: bytes) -> None:
        """waiting: requests that the kernel has before the relay looks."""
        self.device, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.device, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.device.settimeout(DEADLINE_S)
        for message in waiting:
            self.device.send(message)
        theirs.setblocking(False)
        os.set_blocking(fd, False)
        self.end = ""
        self._mounted = Mounted(FuseWay(theirs.detach()), b"/nonexistent", [])
        self._wakeup = Wakeup((signal.SIGTERM,))
        self._fd = fd
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.end = self._mounted.run(self._fd, b"", self._wakeup, Log())

    def answer(self, message: bytes) -> bytes:
        self.device.send(message)
        return self.device.recv(1 << 20)

    def join(self) -> str:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self._wakeup.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.device.close()
        return self.end


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[tuple[Served, Guest]]:
    served = Served(folder)
    guest = Guest(served.fd)
    try:
        yield served, guest
    finally:
        served.tell_to_end()
        guest.join()
        served.join()


def test_requests_go_to_the_host_and_answers_come_back(tmp_path: Path) -> None:
    with joined(tmp_path) as (_, guest):
        kernel = Kernel(guest.answer)
        made, handle = kernel.create(b"a")
        assert kernel.write(handle, b"x" * 50_000) == 50_000
        assert kernel.read(handle, 50_000) == b"x" * 50_000
        assert kernel.stat(made.node).size == 50_000
    assert (tmp_path / "a").stat().st_size == 50_000


def test_requests_that_wait_together_go_together() -> None:
    """A connection with borders between messages shows what one write had; the last one stays for the next."""
    host, fd = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    small, large = b"s" * 80, b"l" * (TOGETHER_MAX + 1)
    with host:
        host.settimeout(DEADLINE_S)
        guest = Guest(fd.detach(), small, small, large, small)
        try:
            assert host.recv(1 << 20) == small + small + large
            assert host.recv(1 << 20) == small
        finally:
            host.shutdown(socket.SHUT_RDWR)
            assert guest.join() == "closed"


def test_end_of_the_host_is_the_end_of_the_mount(tmp_path: Path) -> None:
    with joined(tmp_path) as (served, guest):
        Kernel(guest.answer)
        served.tell_to_end()
        # The relay closes its device: the kernel then answers every program with an error.
        assert guest.device.recv(1) == b""
    assert guest.end == "closed"
    assert served.end == "it was ended"


def test_end_of_the_guest_is_told(tmp_path: Path) -> None:
    served = Served(tmp_path)
    os.close(served.fd)
    assert served.join() == "the guest ended it"


def test_guest_without_fuse_is_told_of_and_left(tmp_path: Path) -> None:
    served = Served(tmp_path)
    os.write(served.fd, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 2)
    assert served.join() == "the guest broke the protocol: the first message is not INIT"
    os.close(served.fd)


def test_guest_that_takes_no_answers_costs_bounded_memory(tmp_path: Path) -> None:
    """Each request of 80 bytes asks for a megabyte."""
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    served = Served(tmp_path)
    with socket.socket(fileno=served.fd) as connection, connection.makefile("rb") as answers:
        connection.settimeout(DEADLINE_S)

        def answer(message: bytes) -> bytes:
            connection.sendall(message)
            head = answers.read(4)
            return head + answers.read(struct.unpack("<I", head)[0] - 4)

        kernel = Kernel(answer)
        handle = kernel.open(kernel.look_up(b"a").node)
        head = struct.pack("<IIQQIIIHH", 80, READ, 2, ROOT, 0, 0, 0, 0, 0)
        flood = (head + struct.pack("<QQIIQII", handle, 0, 1 << 20, 0, 0, 0, 0)) * 50
        connection.sendall(flood)
        # The answer of one request may go beyond the ceiling, and no second one.
        for _ in range(50):
            assert served.serving.waiting_bytes <= WAITING_MAX + (1 << 20) + 16
            size = len(answers.read((1 << 20) + 16))
            assert size == (1 << 20) + 16
    assert served.join() == "the guest ended it"


@pytest.mark.parametrize("path", [b"", b"/", b"//", b"mnt", b"/mnt/../etc", b"/mnt\0", b"/" + b"x" * 4096])
def test_place_that_is_none_is_refused(path: bytes) -> None:
    around = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)
    with pytest.raises(RefusalError, match="absolute path"):
        open_service(Share(path=path), -1, around)


FEW = """
import os, resource, sys
from pathlib import Path
from tests.vmkit.shares.kernel import Kernel
from tests.vmkit.shares.test_serving import joined
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
with joined(Path(sys.argv[1])) as (_, guest):
    kernel = Kernel(guest.answer)
    before = len(os.listdir("/proc/self/fd"))
    nodes = [node for node in kernel.list(size=1 << 16).values() if node]
    for node in nodes:
        kernel.stat(node)
    print(len(nodes), len(os.listdir("/proc/self/fd")) - before)
"""


def test_files_that_a_guest_remembers_cost_neither_side_a_descriptor(tmp_path: Path) -> None:
    """As `find` over a large folder: 5,000 files, where a process may have 1,024 open."""
    for number in range(5000):
        (tmp_path / str(number)).touch()
    done = subprocess.run(
        [sys.executable, "-c", FEW, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout) == ("", "5000 0\n")
