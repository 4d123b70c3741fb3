"""systemd's ssh proxy connects through our device: its `vsock-mux` is Firecracker's hybrid vsock."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import DEADLINE_S
from vsh.address import VSHD_PORT, Address
from vsh.client import Client
from vsh.registry import find_machine

# VMKIT_TEST_SSH_PROXY: the command of one that is not installed.
PROXY = os.environ.get("VMKIT_TEST_SSH_PROXY", "/usr/lib/systemd/systemd-ssh-proxy").split()


@pytest.mark.skipif(not Path(PROXY[0]).exists(), reason="systemd before 256 has no ssh proxy")
def test_connection_that_systemds_ssh_proxy_opens_reaches_the_guest(ready: str) -> None:
    """As with ssh's ProxyUseFdpass: it passes the connection to its standard output, and ends."""
    machine = find_machine(name=ready)
    assert machine is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [*PROXY, f"vsock-mux{machine.vsock}", str(VSHD_PORT)]
        subprocess.run(words, stdout=theirs.fileno(), check=True, timeout=DEADLINE_S)
        ours.settimeout(DEADLINE_S)
        _, (connection,), _, _ = socket.recv_fds(ours, 1, 1)
    # It leaves the device's answer to ssh, which skips lines before the server's greeting (RFC 4253, 4.2).
    answer = b""
    while not answer.endswith(b"\n"):
        byte = os.read(connection, 1)
        assert byte, answer
        answer += byte
    assert answer.startswith(b"OK "), answer
    with Client(Address.descriptor(connection)) as client:
        assert client.run(["uname", "-n"], text=True).stdout == f"{ready}\n"
