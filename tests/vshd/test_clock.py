"""The clock of a guest: the service over a socket pair, and a real vshd whose namespace cannot set the clock."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.vsh.live import DEADLINE_S, IS_VSOCK_GUEST, StartVshd, wait_until
from tests.vshd.service_thread import serve_in_thread
from tests.vshd.test_init import needs_namespace
from vsh.address import Address
from vsh.clock import ASK, GuestClock, exchange, open_clock
from vsh.errors import Unanswered, VshError
from vshd.services.clock import ClockService, KernelClock

NAMESPACE = ["unshare", "--user", "--map-root-user"]


class Served(KernelClock):
    """A running service whose clock is `ahead_ns` ahead. `seen` are the times that it set; `end` is its last word."""

    __slots__ = ("ahead_ns", "client", "end", "seen")

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.ahead_ns = 0
        self.seen: list[int] = []
        self.end = ""

    def read(self) -> int:
        return time.time_ns() + self.ahead_ns

    def set(self, time_ns: int) -> None:
        self.seen.append(time_ns)
        self.ahead_ns = time_ns - time.time_ns()


@contextlib.contextmanager
def serving(rest: bytes = b"") -> Iterator[Served]:
    ours, theirs = socket.socketpair()
    served = Served(ours)
    with serve_in_thread(lambda: ClockService(served), served, theirs, rest):
        yield served


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def ask(client: socket.socket, value: int) -> int:
    return int.from_bytes(exchange(client.fileno(), word(value), time.monotonic() + DEADLINE_S), "little")


def test_word_of_zero_changes_nothing_and_other_words_are_the_time() -> None:
    with serving() as served:
        assert [abs(ask(served.client, value) - time.time_ns()) < 10**10 for value in (0, 5_000)] == [True, True]
        assert [ask(served.client, value) < 10**10 for value in (0, 6_000)] == [True, True]
    assert served.seen == [5_000, 6_000]
    assert served.end == "ended"


@pytest.mark.parametrize("size", range(1, 9))
def test_word_in_pieces_is_a_word(size: int) -> None:
    with serving(word(7)[:size]) as served:
        for byte in word(7)[size:]:
            served.client.sendall(bytes([byte]))
        assert len(served.client.recv(8, socket.MSG_WAITALL)) == 8
    assert served.seen == [7]


@pytest.mark.parametrize("sent", [word(1 << 63), word(2**64 - 1), word(5) + word(6), b"x" * 9], ids=bytes.hex)
def test_what_is_no_word_ends_the_service(sent: bytes) -> None:
    with serving() as served:
        served.client.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert served.client.recv(8) == b""
    assert served.end.startswith("ended: the host")
    assert served.seen == []


def test_signal_ends_the_service() -> None:
    with serving() as served:
        ask(served.client, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert served.client.recv(1) == b""


def test_clock_that_does_not_answer_has_a_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(Unanswered, match="does not answer with its time"):
        exchange(ours.fileno(), ASK, time.monotonic() + 0.05)


@pytest.mark.parametrize("ahead_s", [-3600, -1, 0, 1, 10**9])
def test_clock_that_is_off_is_measured_and_set(ahead_s: int) -> None:
    with serving() as served:
        served.ahead_ns = ahead_s * 10**9
        clock = GuestClock(os.dup(served.client.fileno()), "m", DEADLINE_S)
        try:
            for offset in (clock.measure(), clock.set()):
                assert abs(offset.ahead_ns - ahead_s * 10**9) <= offset.error_ns + 1_000_000
            after = clock.measure()
            assert abs(after.ahead_ns) <= after.error_ns + 10_000_000
        finally:
            clock.close()


@needs_namespace
@pytest.mark.skipif(IS_VSOCK_GUEST, reason="a namespace's root cannot bind vshd's port")
def test_real_vshd_is_measured_and_cannot_set_a_clock_that_is_not_its_own(start_vshd: StartVshd) -> None:
    vshd = start_vshd(wrapper=NAMESPACE)
    clock = open_clock(Address.unix(str(vshd.path)), timeout_s=DEADLINE_S)
    try:
        for _ in range(3):
            offset = clock.measure()
            # It is this host's own clock.
            assert abs(offset.ahead_ns) <= offset.error_ns + 1_000_000
        assert len(vshd.children()) == 1
        with pytest.raises(VshError, match="closed the connection to its clock"):
            clock.set()
        with pytest.raises(VshError, match="broke"):
            clock.measure()
    finally:
        clock.close()
    wait_until(lambda: ": ended: Operation not permitted after " in vshd.log, "the log has the reason")
