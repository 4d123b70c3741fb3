"""Ports that appear by themselves: a forwarder whose guest reports what the test says, and serves through a real vshd.

The guest's servers listen at 127.0.0.2, since the guest and the host are one here; so the same number is free.
"""

import ast
import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.other_user import ask_as_other
from tests.vsh.forward.servers import Echo, TcpServer, connect
from tests.vsh.forward.test_loopbacks import needs_ipv6
from tests.vsh.live import Vshd, wait_until
from vsh.address import Address
from vsh.errors import Unreachable
from vsh.forward import automatic
from vsh.forward.choice import FORWARDED_MAX, AutomaticSpec, PortChange, Ranges
from vsh.forward.forwarder import Forwarder
from vshd.wire.ports import encode_report

GUEST = b"\x7f\0\0\2"
GARBAGE = b"\xff" * 8


class Guest(Forwarder):
    """The forwarder of a guest whose reports are the test's. `changes` and `notices` are what the user is told.

    ways: the guest's ends of the connections for reports, the newest last.
    """

    def __init__(self, vshd: Vshd, include: Ranges) -> None:
        self.changes: list[tuple[str, int, tuple[str, ...], str]] = []
        self.notices: list[str] = []
        self.failures: list[str] = []
        self.ways: list[socket.socket] = []
        self.is_up = True
        spec = AutomaticSpec(self._note, self.notices.append, include)
        where = Address.unix(str(vshd.path))
        super().__init__(lambda: where, [spec], tell=self.failures.append, is_lasting=True)

    def _note(self, change: PortChange) -> None:
        self.changes.append((change.kind, change.port, change.listening, change.reason))

    def open_reports(self) -> tuple[int, bytes]:
        if not self.is_up:
            raise Unreachable("the guest is down")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.ways.append(theirs)
        return ours.detach(), b""

    def report(self, *ports: int) -> None:
        self.ways[-1].sendall(encode_report(dict.fromkeys(ports, GUEST)))

    def close_ways(self) -> None:
        for way in self.ways:
            way.close()

    def places(self) -> dict[int, tuple[str, ...]]:
        """Where the guest's ports are now, as the user was told."""
        now: dict[int, tuple[str, ...]] = {}
        for kind, port, listening, _ in self.changes:
            if kind == PortChange.OPENED:
                now[port] = listening
            elif kind == PortChange.CLOSED:
                del now[port]
        return now

    def wait_for(self, *ports: int) -> None:
        wait_until(lambda: sorted(self.places()) == sorted(ports), f"the ports {ports}, not {self.changes}")


@pytest.fixture
def start_guest(vshd: Vshd) -> Iterator[Callable[..., Guest]]:
    """Starts a forwarder in a thread. At its end no session is left."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        # The forwarder raises it, for a process of its own.
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)

        def start(include: Ranges = (range(1, 65536),)) -> Guest:
            guest = stack.enter_context(Guest(vshd, include))
            stack.callback(guest.close_ways)
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            thread = threading.Thread(target=guest.run, args=(reading,))
            stack.callback(thread.join)
            stack.callback(os.close, writing)
            thread.start()
            return guest

        yield start
    wait_until(lambda: not vshd.children(), "no session is left")


def take_port() -> tuple[socket.socket, int]:
    """A listener of this host whose next port is free; its port."""
    while True:
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if port < 65535 and is_free(port + 1):
            return taken, port
        taken.close()


@contextlib.contextmanager
def guest_server(handler: Any = Echo, port: int = 0) -> Iterator[int]:
    """A server in the guest; its port."""
    server = TcpServer(("127.0.0.2", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        return False
    return True


def talk(client: socket.socket) -> None:
    client.sendall(b"there and back")
    assert client.recv(100) == b"there and back"


def test_port_appears_at_its_number_and_goes_with_its_listener(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    with guest_server() as port:
        guest.report(port)
        guest.wait_for(port)
        assert guest.places()[port][0] == f"127.0.0.1:{port}"
        with connect(port) as client:
            talk(client)
        guest.report()
        guest.wait_for()
        assert is_free(port)


@needs_ipv6
def test_port_is_at_both_loopbacks(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    with guest_server() as port:
        guest.report(port)
        guest.wait_for(port)
        assert guest.places()[port] == (f"127.0.0.1:{port}", f"[::1]:{port}")
        with socket.create_connection(("::1", port)) as client:
            talk(client)


def test_connection_outlives_the_listener_that_took_it(start_guest: Callable[..., Guest]) -> None:
    """Such as that of `nc -l`, which listens no more once it has its client."""
    guest = start_guest()
    with guest_server() as port:
        guest.report(port)
        guest.wait_for(port)
        with connect(port) as client:
            talk(client)
            guest.report()
            guest.wait_for()
            talk(client)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_port_in_use_is_told_and_never_taken(start_guest: Callable[..., Guest], host: str) -> None:
    guest = start_guest()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with guest_server(port=port):
            guest.report(port)
            guest.wait_for(port)
            [(_, _, listening, reason)] = guest.changes
            assert reason == f"port {port} of this host is in use"
            here = int(listening[0].rpartition(":")[2])
            assert here != port
            with connect(here) as client:
                talk(client)
        # Its owner still has it.
        socket.create_connection((host, port)).close()


def test_port_of_root_goes_up_by_8000(vshd: Vshd) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 81:
        pytest.skip("any user of this host may listen at port 81")

    def forward() -> list[tuple[str, int, tuple[str, ...], str]]:
        reading, writing = os.pipe()
        with Guest(vshd, (range(1, 65536),)) as guest:
            guest.report(81)
            thread = threading.Thread(target=guest.run, args=(reading,))
            thread.start()
            wait_until(lambda: guest.changes, "a change")
            os.close(writing)
            thread.join()
        return guest.changes

    [(kind, port, listening, reason)] = ast.literal_eval(ask_as_other(forward) if not os.geteuid() else repr(forward()))
    assert (kind, port, reason) == ("opened", 81, "port 81 of this host is for root alone")
    assert int(listening[0].rpartition(":")[2]) >= 8081


def test_each_port_gets_its_own_number_before_it_is_the_next_of_another(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    taken, port = take_port()
    with taken:
        guest.report(port, port + 1)
        guest.wait_for(port, port + 1)
        places = guest.places()
        assert places[port + 1][0] == f"127.0.0.1:{port + 1}"
        assert places[port][0] not in (f"127.0.0.1:{port}", places[port + 1][0])


def test_lists_keep_other_ports_away(start_guest: Callable[..., Guest]) -> None:
    with guest_server() as one, guest_server() as two:
        guest = start_guest((range(one, one + 1),))
        guest.report(one, two)
        guest.wait_for(one)
        assert is_free(two)


def test_ports_stay_while_the_connection_comes_back(start_guest: Callable[..., Guest]) -> None:
    """As when vshd is restarted."""
    guest = start_guest()
    with guest_server() as port, guest_server() as other:
        guest.report(port)
        guest.wait_for(port)
        guest.ways[0].close()
        wait_until(lambda: len(guest.ways) == 2, "it connects anew")
        with connect(port) as client:
            talk(client)
        # What was missed meanwhile is in the first report.
        guest.report(port, other)
        guest.wait_for(port, other)
        assert [kind for kind, *_ in guest.changes] == ["opened", "opened"]
        assert guest.notices == []


def test_guest_that_is_gone_takes_its_ports_along_until_it_is_back(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    with guest_server() as port:
        guest.report(port)
        guest.wait_for(port)
        guest.is_up = False
        guest.ways[0].close()
        guest.wait_for()
        assert is_free(port)
        assert guest.notices == ["the guest is gone; its ports come back with it"]
        guest.is_up = True
        wait_until(lambda: len(guest.ways) == 2, "it connects anew")
        guest.report(port)
        guest.wait_for(port)
        assert guest.notices[1:] == ["the guest is back"]


def test_guest_that_reports_too_many_ports_gets_some_and_a_line(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    ports = range(20_000, 20_000 + FORWARDED_MAX + 50)
    guest.report(*ports)
    wait_until(lambda: len(guest.changes) == FORWARDED_MAX, "the limit")
    guest.report(*ports, 30_000)
    guest.report(*ports, 30_000, 30_001)
    guest.report()
    guest.wait_for()
    [notice] = guest.notices
    assert notice.endswith(f"; {FORWARDED_MAX} of them are forwarded")


def test_guest_that_sends_no_reports_is_told_once_and_loses_its_ports(start_guest: Callable[..., Guest]) -> None:
    guest = start_guest()
    with guest_server() as port:
        guest.report(port)
        guest.wait_for(port)
        guest.ways[0].sendall(GARBAGE)
        tries = 1
        while guest.places():
            wait_until(lambda: len(guest.ways) > tries or not guest.places(), "it connects anew")  # noqa: B023
            if len(guest.ways) > tries:
                tries += 1
                guest.ways[-1].sendall(GARBAGE)
        garbage = [notice for notice in guest.notices if "no list of ports" in notice]
        assert len(garbage) == 1
        assert guest.notices[-1] == "the guest is gone; its ports come back with it"


def test_guest_that_opens_ports_in_a_loop_is_slowed_down(
    start_guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "BURST_MAX", 10)
    # So long that no more than the burst is opened here.
    monkeypatch.setattr(automatic, "REFILL_S", 3600.0)
    guest = start_guest()
    guest.report(*range(20_000, 20_030))
    wait_until(lambda: len(guest.changes) == 10, "the burst")
    guest.report(20_050)
    wait_until(lambda: len(guest.changes) == 20, "all are closed, and none is opened")
    assert guest.places() == {}
    assert guest.notices == ["the guest opens ports too often; one each 3600 s is forwarded now"]


def test_flood_of_reports_is_read_in_pauses(start_guest: Callable[..., Guest]) -> None:
    """The transport holds the guest up."""
    guest = start_guest()
    guest.ways[-1].setblocking(False)
    frame = encode_report({})
    sent = 0
    with contextlib.suppress(BlockingIOError):
        for _ in range(1_000_000):
            sent += guest.ways[-1].send(frame * 100)
    assert sent < 1_000_000 * 4
    assert guest.changes == []
