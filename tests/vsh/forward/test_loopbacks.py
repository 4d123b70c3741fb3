"""-R at the guest's localhost: 127.0.0.1 and ::1 with one port, as programs try either first."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.vsh.forward.servers import Echo, serving
from tests.vsh.live import CHECKOUT, DEADLINE_S, Vshd, ended, read_line, wait_until
from tests.vshd.test_init import needs_namespace
from vshd.carry.endpoints import PlaceError, listen_on_each

ADDRESSES = ["127.0.0.1", "::1"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(
    not has_ipv6(), reason="this kernel or namespace has no ::1, as in a container without IPv6"
)


def ask(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), DEADLINE_S) as client:
        client.sendall(b"there and back")
        return client.recv(100)


@needs_ipv6
@pytest.mark.parametrize("listen", ["0", "localhost:0"])
def test_remote_forward_listens_at_both_addresses_and_ends_at_both(vshd: Vshd, listen: str) -> None:
    with serving(Echo) as target:
        with ended(vshd.start("-v", "-N", "-R", f"{listen}:{target}")) as process:
            place = read_line(process.stderr).split(" at ")[1].split(" for ")[0]
            kind, port = place.rsplit(":", 1)
            assert kind == "tcp:localhost"
            assert [ask(host, int(port)) for host in ADDRESSES] == [b"there and back"] * 2
            process.terminate()
            assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        wait_until(lambda: not vshd.children(), "the forward's process has ended")
        for host in ADDRESSES:
            with pytest.raises(ConnectionRefusedError):
                ask(host, int(port))


@needs_ipv6
def test_explicit_address_is_the_only_one(vshd: Vshd) -> None:
    with (
        serving(Echo) as target,
        ended(vshd.start("-v", "-N", "-R", f"127.0.0.1:0:{target}")) as process,
    ):
        place = read_line(process.stderr).split(" at ")[1].split(" for ")[0]
        assert place.startswith("tcp:127.0.0.1:")
        port = int(place.rpartition(":")[2])
        assert ask("127.0.0.1", port) == b"there and back"
        with pytest.raises(ConnectionRefusedError):
            ask("::1", port)


@needs_ipv6
@pytest.mark.parametrize("host", ADDRESSES)
def test_port_that_is_taken_at_one_address_is_refused_at_both(host: str) -> None:
    """Otherwise some clients of localhost would reach the other program."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlaceError, match="Address already in use"):
            listen_on_each(f"tcp:localhost:{port}")
        other = ADDRESSES[1 - ADDRESSES.index(host)]
        with pytest.raises(ConnectionRefusedError):
            ask(other, port)


# Runs in network namespaces of its own.
NETWORK = """
import socket, subprocess
from pathlib import Path
from vshd.carry.endpoints import listen_on_each
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
with socket.create_server(("::1", 40000), family=socket.AF_INET6):
    for _ in range(20):
        listeners = listen_on_each("tcp:localhost:0")
        print(*(listener.socket.getsockname()[:2] for listener in listeners))
        for listener in listeners:
            listener.close()
subprocess.run(["ip", "address", "del", "::1/128", "dev", "lo"], check=True)
print(*(listener.socket.getsockname()[:2] for listener in listen_on_each("tcp:localhost:40000")))
"""


@needs_namespace
def test_free_port_is_free_at_both_and_a_guest_without_ipv6_has_one() -> None:
    argv = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", NETWORK]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False)
    assert done.stdout.splitlines() == [*["('127.0.0.1', 40001) ('::1', 40001)"] * 20, "('127.0.0.1', 40000)"], done
