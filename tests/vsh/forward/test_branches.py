"""-L to what a vshd has to open: one session of the guest for all clients, and a session each where it cannot be."""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vsh.forward.servers import CountThenAnswer, Echo, connect, read_all, serving
from tests.vsh.forward.test_crowds import crowd, forwarding, read_errors
from tests.vsh.live import CHECKOUT, DEADLINE_S, StartVshd, Vshd, read_line, wait_until
from vsh.address import Address
from vsh.forward import branches, trunk
from vsh.forward.trunk import Dialer

# A vshd as it was before it knew branches: the field is one that it skips.
OLD_VSHD = """
import sys
sys.path.insert(0, {root!r})
from vshd.wire.requests import Forward
Forward.FIELDS = tuple(field for field in Forward.FIELDS if field.name != "branches")
Forward.__init_subclass__.__func__(Forward)
from vshd.__main__ import main
sys.exit(main(sys.argv[7:]))
"""


def echo(where: int | str, word: bytes = b"word") -> None:
    with connect(where) as client:
        client.sendall(word)
        assert client.recv(100) == word


def sessions(vshd: Vshd) -> int:
    """How many the log has seen end, and those that run."""
    return vshd.log.count(": forward to ") + len(vshd.children())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_clients_share_one_session(start_vshd: StartVshd, kind: str, tmp_path: Path) -> None:
    vshd = start_vshd()
    with serving(Echo, tmp_path / "server" if kind == "unix" else None) as where:
        target = f"unix:{where}" if kind == "unix" else f"127.0.0.1:{where}"
        with forwarding(vshd, "-L", f"0:{target}") as (process, here):
            for _ in range(20):
                echo(here)
            assert crowd(here, 50) == []
            assert len(vshd.children()) == 1
            assert read_errors(process) == []
    wait_until(lambda: ": closed, after 70 connections, after" in vshd.log, "the log has the session")
    assert sessions(vshd) == 1


def test_client_that_speaks_late_or_not_at_all_is_served(vshd: Vshd) -> None:
    with serving(CountThenAnswer) as port, forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
        for size in (0, 1, 100_000):
            for _ in range(3):
                with connect(here) as client:
                    client.sendall(bytes(size))
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(client) == b"%d\n" % size
        assert read_errors(process) == []


def test_client_may_wait_without_a_limit(vshd: Vshd) -> None:
    """poll() takes no time that long."""
    with (
        serving(Echo) as port,
        forwarding(vshd, "--connect_timeout=0", "-L", f"0:127.0.0.1:{port}") as (process, here),
    ):
        echo(here)
        echo(here)
        assert read_errors(process) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_session_that_ends_costs_its_connections_and_no_later_client(vshd: Vshd, number: int) -> None:
    with serving(Echo) as port, forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
        for _ in range(3):
            with connect(here) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                (session,) = vshd.children()
                os.kill(session, number)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            assert crowd(here, 10) == []
        assert read_errors(process) == []


def test_branches_ahead_of_clients_may_be_dead(vshd: Vshd) -> None:
    """The guest's session is killed while nothing looks: its branches are found dead when clients come."""
    with serving(Echo) as port, forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
        echo(here)
        for _ in range(5):
            (session,) = vshd.children()
            process.send_signal(signal.SIGSTOP)
            client = connect(here)
            client.sendall(b"word")
            os.kill(session, signal.SIGKILL)
            wait_until(lambda: not vshd.children(), "the session has ended")
            process.send_signal(signal.SIGCONT)
            with client:
                assert client.recv(10) == b"word"
        assert read_errors(process) == []


def test_old_vshd_serves_a_session_each(start_vshd: StartVshd) -> None:
    script = OLD_VSHD.format(root=str(CHECKOUT))
    vshd = start_vshd(wrapper=[sys.executable, "-I", "-S", "-B", "-c", script])
    with serving(Echo) as port, forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
        for _ in range(3):
            echo(here)
        assert crowd(here, 10) == []
        assert read_errors(process) == []
    assert vshd.log.count(": a forward that neither connects nor listens\n") == 1
    wait_until(lambda: vshd.log.count(f": forward to tcp:127.0.0.1:{port}\n") == 13, "each had a session")


def test_name_that_needs_a_look_up_gets_a_session_each(start_vshd: StartVshd) -> None:
    vshd = start_vshd()
    with serving(Echo) as port, forwarding(vshd, "-L", f"0:localhost.:{port}") as (process, here):
        with contextlib.suppress(ConnectionResetError):
            echo(here)
            echo(here)
        told = read_errors(process)
    assert told == [] or "cannot find tcp:localhost." in told[0]
    assert vshd.log.count("no branches: cannot find tcp:localhost.") == 1


def test_refusals_are_told_for_clients_with_a_branch_ahead(vshd: Vshd) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        closed.listen()
        port = closed.getsockname()[1]
        with forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
            for _ in range(2):
                with connect(here) as client:
                    closed.accept()[0].close()
                    assert client.recv(1) == b""
            closed.close()
            for _ in range(4):
                with pytest.raises((ConnectionResetError, BrokenPipeError)), connect(here) as client:
                    client.sendall(b"x")
                    while client.recv(1):
                        pass
                    raise AssertionError("an end, and no reset")
                assert process.stderr is not None
                line = read_line(process.stderr)
                assert line.endswith(f"cannot connect to tcp:127.0.0.1:{port}: Connection refused"), line


def test_unused_session_of_the_guest_ends_and_comes_back(vshd: Vshd, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys; from vsh.forward import branches; branches.TRUNK_S = branches.AHEAD_S = 0.2;"
        "from vsh.__main__ import main; sys.exit(main())"
    )
    monkeypatch.setattr(vshd, "argv", lambda *words, limits="": [sys.executable, "-c", script, *vshd.where, *words])
    with serving(Echo) as port, forwarding(vshd, "-L", f"0:127.0.0.1:{port}") as (process, here):
        for _ in range(2):
            echo(here)
            wait_until(lambda: not vshd.children(), "the unused session has ended")
        with connect(here) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            with contextlib.suppress(TimeoutError):
                client.settimeout(1)
                client.recv(1)
            # In use: it stays.
            assert len(vshd.children()) == 1
        assert read_errors(process) == []


# The parts.


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("unix:@x", "hybrid"),
        ("unix:/x", "unix"),
        ("vsock:5", "unix"),
        ("vsock:x", "hybrid"),
        ("vsock:4294967295", "hybrid"),
    ],
)
def test_listener_elsewhere_is_not_believed(place: str, kind: str) -> None:
    """A guest must not have us connect to a place of this host."""
    assert trunk._find_listener(Address(kind, name="vm", path="/vm"), place) is None


def test_listener_of_a_machine_is_a_port_of_it() -> None:
    found = trunk._find_listener(Address("hybrid", name="vm", path="/vm"), "vsock:1234")
    assert found is not None
    assert (found.kind, found.path, found.port) == ("hybrid", "/vm", 1234)


def test_failure_to_open_the_session_is_that_of_all_who_waited(tmp_path: Path) -> None:
    """Ten clients of a guest that does not answer wait once, and not one after another."""
    import threading  # noqa: PLC0415
    import time  # noqa: PLC0415

    path = str(tmp_path / "silent")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(64)
        dialer = Dialer(lambda: Address.unix(path), "tcp:127.0.0.1:1", "")
        errors: list[Any] = []

        def dial() -> None:
            try:
                dialer.open(0.5)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=dial) for _ in range(10)]
        began_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert len(errors) == 10
        assert time.monotonic() - began_s < 4
        assert branches.AHEAD_MAX == 2
