"""A forward with branches in the guest: a real vshd on a UNIX socket, clients that speak the protocol themselves."""

import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import nothing_left_open
from tests.vsh.forward.servers import CountThenAnswer, Echo, connect, read_all, serving
from tests.vsh.live import DEADLINE_S, IS_VSOCK_GUEST, StartVshd, Vshd, wait_until
from tests.vshd.test_init import needs_namespace
from vsh.address import Address
from vsh.errors import ExecError, Unreachable
from vsh.forward.trunk import Trunk, open_branch, open_trunk
from vsh.session import open_raw
from vshd.flags import Options
from vshd.listener import open_beside
from vshd.log import Log
from vshd.services.branches import STRANGERS_MAX, BranchServer
from vshd.services.forward import open_service
from vshd.services.table import Surroundings
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup
from vshd.wire import messages
from vshd.wire.branch import GO, SECRET_SIZE, TOKEN_SIZE
from vshd.wire.messages import SetupConnectionResponse
from vshd.wire.requests import Forward

# Of the localhost that a test makes.
ADDRESSES = ("127.0.0.1", "127.0.0.2")
SURROUNDINGS = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)

pytestmark = pytest.mark.skipif(IS_VSOCK_GUEST, reason="speaks to a vshd on a UNIX socket")


@contextlib.contextmanager
def trunk_to(vshd: Vshd, target: str) -> Iterator[Trunk]:
    trunk = open_trunk(Address.unix(str(vshd.path)), target, "", DEADLINE_S)
    assert trunk is not None
    try:
        yield trunk
    finally:
        os.close(trunk.control)
    wait_until(lambda: not vshd.children(), "the session of the forward has ended")


def stranger(trunk: Trunk) -> socket.socket:
    """A connection to a trunk's listener that has shown nothing."""
    return connect(trunk.where.path)


def branch(trunk: Trunk) -> socket.socket:
    """A branch whose sides have proven themselves."""
    opened = open_branch(trunk, DEADLINE_S)
    client = socket.socket(fileno=opened.fd)
    client.settimeout(DEADLINE_S)
    return client


def read_response(client: socket.socket) -> SetupConnectionResponse:
    size = int.from_bytes(client.recv(4, socket.MSG_WAITALL), "little")
    response = SetupConnectionResponse()
    response.merge(client.recv(size, socket.MSG_WAITALL))
    return response


def ask(trunk: Trunk, early: bytes = b"") -> socket.socket:
    """A branch that is connected to its place."""
    client = branch(trunk)
    client.sendall(GO + early)
    assert read_response(client).status == messages.READY
    return client


@pytest.fixture
def vshd(start_vshd: StartVshd) -> Vshd:
    return start_vshd()


@pytest.fixture
def start_vshd(tmp_path: Path) -> Iterator[StartVshd]:
    servers: list[Vshd] = []

    def start(*flags: str, **options: Any) -> Vshd:
        servers.append(Vshd(tmp_path, flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        assert server.stop() == 0, server.log


def test_branches_share_one_session_and_keep_half_closes(vshd: Vshd) -> None:
    with serving(CountThenAnswer) as port, trunk_to(vshd, f"tcp:localhost:{port}") as trunk:
        clients = [ask(trunk, b"early") for _ in range(50)]
        assert len(vshd.children()) == 1
        for number, client in enumerate(clients):
            client.sendall(bytes(number))
            client.shutdown(socket.SHUT_WR)
        for number, client in enumerate(clients):
            with client:
                assert read_all(client) == b"%d\n" % (len(b"early") + number)


def test_refused_place_is_told_and_costs_one_branch(vshd: Vshd) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
            with branch(trunk) as client:
                client.sendall(GO + b"unread")
                response = read_response(client)
            assert response.description.decode() == f"cannot connect to tcp:127.0.0.1:{port}: Connection refused"
            assert response.extended is not None
            assert response.extended.failure is not None
            assert response.extended.failure.error == errno.ECONNREFUSED
            closed.listen()
            ask(trunk).close()


@needs_namespace
def test_every_address_of_localhost_is_tried(start_vshd: StartVshd, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.2 localhost\n")
    in_namespace = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    vshd = start_vshd(wrapper=["unshare", "--mount", "sh", "-c", in_namespace, "sh"])
    for listening, closed in (ADDRESSES, reversed(ADDRESSES)):
        # In one of the two rounds the first address is the closed one.
        with socket.create_server((listening, 0)) as server, socket.socket() as holder:
            port = server.getsockname()[1]
            holder.bind((closed, port))
            with trunk_to(vshd, f"tcp:localhost:{port}") as trunk:
                ask(trunk).close()


@contextlib.contextmanager
def trunk_of_addresses(*ports: int) -> Iterator[Trunk]:
    """The trunk of a server in a thread whose place has these ports of loopback as its addresses."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    token = os.urandom(TOKEN_SIZE)
    listener, description = open_beside(theirs.fileno(), None)
    addresses: list[tuple[int, tuple[object, ...] | str]] = [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]
    server = BranchServer("tcp:name:80", addresses, listener, description, token)
    wakeup = Wakeup(())
    thread = threading.Thread(target=server.run, args=(theirs.detach(), b"", wakeup, Log()))
    thread.start()
    try:
        where = "\0" + description.decode().removeprefix("unix:@")
        yield Trunk(ours.fileno(), Address.unix(where), token)
    finally:
        ours.close()
        thread.join()
        wakeup.close()


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_next_address_is_tried_when_one_fails_at_once() -> None:
    with (
        serving(CountThenAnswer) as port,
        trunk_of_addresses(find_free_port(), find_free_port(), port) as trunk,
        ask(trunk, b"early") as client,
    ):
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"5\n"


def test_next_address_is_tried_when_one_fails_later() -> None:
    """A full backlog drops what the client sends, so its connect() waits; the closed listener then refuses it."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        stack.enter_context(connect(port))
        good = stack.enter_context(serving(CountThenAnswer))
        trunk = stack.enter_context(trunk_of_addresses(port, find_free_port(), good))
        client = stack.enter_context(branch(trunk))
        client.sendall(GO + b"early")
        wait_until(lambda: is_connecting_to(port), "the connect() waits")
        full.close()
        assert read_response(client).status == messages.READY
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"5\n"


def is_connecting_to(port: int) -> bool:
    """Whether a socket of this host waits for an answer of that port of loopback (proc(5), /proc/net/tcp)."""
    place, syn_sent = f"0100007F:{port:04X}", "02"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(words[2:4] == [place, syn_sent] for words in lines)


def test_last_address_that_fails_refuses_the_branch() -> None:
    with trunk_of_addresses(find_free_port(), find_free_port()) as trunk, branch(trunk) as client:
        client.sendall(GO)
        assert read_response(client).description == b"cannot connect to tcp:name:80: Connection refused"


def test_full_backlog_of_a_unix_socket_is_waited_for(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        with trunk_to(vshd, f"unix:{path}") as trunk, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(branch(trunk)) for _ in range(5)]
            for client in clients:
                client.sendall(GO)
            for _ in clients:
                server.accept()[0].close()
            assert [read_response(client).status for client in clients] == [messages.READY] * 5


def test_stranger_learns_nothing(vshd: Vshd) -> None:
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
        secret = trunk.token[:SECRET_SIZE]
        for said in (bytes(SECRET_SIZE), trunk.token[SECRET_SIZE:], secret[:-1] + bytes([secret[-1] ^ 1])):
            with stranger(trunk) as client:
                client.sendall(said)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
        wait_until(lambda: "without the client's secret" in vshd.log, "the log has the stranger")
        ask(trunk).close()


def test_strangers_that_say_nothing_do_not_keep_branches_out(vshd: Vshd) -> None:
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(trunk)) for _ in range(3 * STRANGERS_MAX)]
        ask(trunk).close()
        # The oldest made room.
        assert strangers[0].recv(1) == b""


def test_client_that_leaves_at_any_moment_leaves_nothing(vshd: Vshd) -> None:
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
        (session,) = vshd.children()

        def count() -> int:
            return len(os.listdir(f"/proc/{session}/fd"))

        before = count()
        ask(trunk).close()
        wait_until(lambda: count() == before, "the first one's descriptors are closed")
        for _ in range(20):
            stranger(trunk).close()
            with stranger(trunk) as client:
                client.sendall(trunk.token[:5])
            branch(trunk).close()
            with branch(trunk) as client:
                client.sendall(GO)
            ask(trunk, b"x").close()
        wait_until(lambda: count() <= before, "the descriptors are closed")


def test_more_branches_than_descriptors_wait_for_one_another(start_vshd: StartVshd) -> None:
    """RESERVED_FDS and 8 more: four branches at once."""
    vshd = start_vshd(wrapper=["prlimit", "--nofile=72:72"])
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
        first = [ask(trunk) for _ in range(4)]
        with stranger(trunk) as fifth:
            fifth.sendall(trunk.token[:SECRET_SIZE] + GO + b"word")
            fifth.settimeout(0.2)
            with pytest.raises(TimeoutError):
                fifth.recv(1)
            fifth.settimeout(DEADLINE_S)
            first.pop().close()
            assert fifth.recv(SECRET_SIZE, socket.MSG_WAITALL) == trunk.token[SECRET_SIZE:]
            assert read_response(fifth).status == messages.READY
            assert fifth.recv(4, socket.MSG_WAITALL) == b"word"
        for client in first:
            client.close()


def test_want_of_descriptors_is_waited_for(vshd: Vshd) -> None:
    """A limit that is lowered while it runs is met in the middle of a branch."""
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
        (session,) = vshd.children()
        with branch(trunk) as client:
            limits = resource.prlimit(session, resource.RLIMIT_NOFILE)
            used = {int(name) for name in os.listdir(f"/proc/{session}/fd")}
            free = next(fd for fd in range(len(used) + 1) if fd not in used)
            resource.prlimit(session, resource.RLIMIT_NOFILE, (free, limits[1]))
            client.sendall(GO + b"word")
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.settimeout(DEADLINE_S)
            resource.prlimit(session, resource.RLIMIT_NOFILE, limits)
            assert read_response(client).status == messages.READY
            assert client.recv(4, socket.MSG_WAITALL) == b"word"


def test_end_of_the_trunk_ends_all_branches_and_its_listener(vshd: Vshd) -> None:
    with serving(Echo) as port:
        with trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
            clients = [ask(trunk), branch(trunk), stranger(trunk)]
        for client in clients:
            with client, contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with pytest.raises(Unreachable):
            open_branch(trunk, 1)


def test_killed_session_is_an_end_for_its_branches(vshd: Vshd) -> None:
    with serving(Echo) as port, trunk_to(vshd, f"tcp:127.0.0.1:{port}") as trunk:
        client = ask(trunk)
        os.kill(vshd.children()[0], 9)
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        wait_until(lambda: "the session's process ended with -9" in vshd.log, "the server tells it")


def test_user_is_checked_as_for_every_forward(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--allow_user=root")
    request = Forward(branches=b"tcp:127.0.0.1:1", token=bytes(TOKEN_SIZE), user=b"nobody")
    with pytest.raises(ExecError, match="user nobody is not allowed to log in"):
        open_raw(Address.unix(str(vshd.path)), request, timeout_s=DEADLINE_S)


@pytest.mark.parametrize(
    "fields",
    [
        {"token": bytes(TOKEN_SIZE - 1)},
        {"token": b""},
        {"back": b"unix:/x"},
        {"listen": b"tcp:localhost:0"},
        # A look-up could take long, and would hold up the other branches.
        {"branches": b"tcp:name.example:80"},
        {"branches": b"nonsense"},
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(fields: dict[str, bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, nothing_left_open():
        right = {"branches": b"tcp:127.0.0.1:80", "token": bytes(TOKEN_SIZE)}
        with pytest.raises(RefusalError) as caught:
            open_service(Forward(**{**right, **fields}), theirs.fileno(), SURROUNDINGS)
        assert caught.value.failure.kind == messages.BAD_REQUEST
