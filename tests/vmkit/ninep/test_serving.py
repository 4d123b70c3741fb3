"""vshd's end and this host's end of a share by 9P, joined by a socket. No test here has a kernel that mounts it."""

import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.ninep import kernel as nine
from tests.vmkit.ninep.kernel import ROOT, NineKernel
from tests.vsh.live import DEADLINE_S
from vmkit.ninep.messages import NineMessages
from vmkit.ninep.server import NineSpeaker
from vmkit.shares import serving
from vmkit.shares.serving import WAITING_MAX, ShareService
from vshd.log import Log
from vshd.services.share import UNMOUNTED, Mounted
from vshd.services.share_9p import NineWay, watch_nothing
from vshd.signals import Wakeup
from vshd.wire.requests import Share


class ServedNine:
    """A host that serves a folder, in a thread. `guest` is the other end of its connection."""

    def __init__(self, folder: Path) -> None:
        ours, self.guest = socket.socketpair()
        self.guest.settimeout(DEADLINE_S)
        ours.setblocking(False)
        self.shown = threading.Event()
        self.end = ""
        self._stop, self._stopped = os.pipe()
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._ours = ours
        self.serving = ShareService(ours.fileno(), NineSpeaker(self._folder, is_read_only=False))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.end = self.serving.run(b"", self._stop, lambda: True, self.shown.set)
        self._ours.close()

    def answer(self, message: bytes) -> bytes:
        self.guest.sendall(message)
        return self.receive()

    def receive(self) -> bytes:
        head = self._receive(4)
        return head + self._receive(struct.unpack("<I", head)[0] - 4)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.guest.recv(size - len(data))
            assert piece
            data += piece
        return data

    def tell_to_end(self) -> None:
        os.write(self._stopped, b"x")

    def join(self) -> str:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.guest.close()
        for fd in (self._folder, self._stop, self._stopped):
            os.close(fd)
        return self.end


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    wakeup = Wakeup((signal.SIGTERM,))
    yield wakeup
    wakeup.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_folder_is_the_guests_once_it_is_mounted(tmp_path: Path) -> None:
    served = ServedNine(tmp_path)
    kernel = NineKernel(served.answer)
    kernel.stat(ROOT)
    assert not served.shown.is_set()
    kernel.call(nine.STATFS, struct.pack("<I", ROOT))
    assert served.shown.wait(DEADLINE_S)
    _, handle = kernel.create(b"a")
    assert kernel.write(handle, b"x" * 50_000) == 50_000
    served.tell_to_end()
    assert served.join() == "it was ended"
    assert (tmp_path / "a").stat().st_size == 50_000


def test_guest_that_does_not_mount_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOUNT_TIMEOUT_S", 0.05)
    served = ServedNine(tmp_path)
    assert served.join() == "it took longer than 0.05 s"
    assert not served.shown.is_set()


def test_guest_that_speaks_something_else_is_left(tmp_path: Path) -> None:
    for words, reason in [
        (b"GET / HTTP/1.1\r\n\r\n", "a message has 542393671 bytes"),
        (struct.pack("<IBH", 7, 99, 1), "the first message is not Tversion"),
        (struct.pack("<IBH", 6, 99, 1), "a message has 6 bytes"),
    ]:
        served = ServedNine(tmp_path)
        served.guest.sendall(words)
        assert served.join() == f"the guest broke the protocol: {reason}"
        assert not served.shown.is_set()


def test_guest_that_takes_no_answers_costs_bounded_memory(tmp_path: Path) -> None:
    """Each request of 23 bytes asks for a megabyte."""
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    served = ServedNine(tmp_path)
    kernel = NineKernel(served.answer, msize=1 << 20)
    handle = kernel.open(kernel.look_up(b"a").node)
    kernel.call(nine.STATFS, struct.pack("<I", ROOT))
    served.guest.sendall(struct.pack("<IBHIQI", 23, nine.READ, 1, handle, 0, 1 << 20) * 50)
    # The answer of one request may go beyond the ceiling, and no second one.
    for _ in range(50):
        assert served.serving.waiting_bytes <= WAITING_MAX + (1 << 20)
        assert len(served.receive()) == 1 << 20
    served.guest.shutdown(socket.SHUT_RDWR)
    assert served.join() == "the guest ended it"


class StoppedSpeaker:
    """Is told to end while it answers its first request. `answered` is how many requests it has answered."""

    is_mounted = True

    def __init__(self, stopped: int) -> None:
        self.messages = NineMessages()
        self.answered = 0
        self._stopped = stopped

    def answer(self, _message: memoryview) -> bytes:
        self.answered += 1
        os.write(self._stopped, b"x")
        return b""

    def close(self) -> None:
        pass


def test_guest_that_asks_for_much_at_once_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TURN_S", 0.0, raising=False)
    stop, stopped = os.pipe()
    ours, guest = socket.socketpair()
    try:
        ours.setblocking(False)
        speaker = StoppedSpeaker(stopped)
        service = ShareService(ours.fileno(), speaker)
        assert service.run(struct.pack("<IBH", 7, nine.STATFS, 1) * 50, stop, lambda: True) == "it was ended"
        assert speaker.answered == 1
    finally:
        ours.close()
        guest.close()
        os.close(stop)
        os.close(stopped)


def test_end_of_a_guest_that_asked_for_much_is_seen_before_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TURN_S", 0.0, raising=False)
    stop, stopped = os.pipe()
    ours, guest = socket.socketpair()
    try:
        ours.setblocking(False)
        guest.close()
        speaker = StoppedSpeaker(stopped)
        service = ShareService(ours.fileno(), speaker)
        requests = struct.pack("<IBH", 7, nine.STATFS, 1) * 50
        assert service.run(requests, stop, lambda: False) == "the guest ended it"
        assert speaker.answered == 1
    finally:
        ours.close()
        os.close(stop)
        os.close(stopped)


def test_mount_that_fails_in_the_guest_is_explained_on_the_host(tmp_path: Path, wakeup: Wakeup) -> None:
    """mount(2) comes after vshd's answer: so vshd reports its errno on the connection."""
    served = ServedNine(tmp_path)
    way = NineWay(watch_nothing())
    share = Share(path=b"/proc/none/here")
    way.mount(share)
    end = Mounted(way, share.path, []).run(os.dup(served.guest.fileno()), b"", wakeup, Log())
    assert end.startswith("cannot mount: ")
    assert served.join().startswith("mount(2) failed there: ")
    assert not served.shown.is_set()


def test_end_of_the_host_ends_the_share_in_the_guest(wakeup: Wakeup) -> None:
    host, guest = socket.socketpair()
    way = NineWay(watch_nothing())
    with guest:
        # What can be read is for the kernel.
        host.sendall(b"answer")
        host.close()
        assert way.await_end(guest.fileno(), wakeup) == "closed"
        way.close()


def test_end_of_the_mount_ends_the_share(tmp_path: Path, wakeup: Wakeup) -> None:
    """inotify tells of both in one way."""
    (tmp_path / "mounted").mkdir()
    host, guest = socket.socketpair()
    way = NineWay(watch_nothing())
    with host, guest:
        way.watch(os.fsencode(tmp_path / "mounted"))
        (tmp_path / "mounted").rmdir()
        assert way.await_end(guest.fileno(), wakeup) == UNMOUNTED
        way.close()


def test_end_of_vshd_ends_the_share(wakeup: Wakeup) -> None:
    host, guest = socket.socketpair()
    way = NineWay(watch_nothing())
    with host, guest:
        os.kill(os.getpid(), signal.SIGTERM)
        assert way.await_end(guest.fileno(), wakeup) == "vshd is shutting down"
        way.close()
