"""Connections to a place of the guest."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S
from vsh.address import Address
from vsh.forward.guest import connect_guest


@pytest.mark.parametrize("timeout_s", [0.0, DEADLINE_S], ids=["no limit", "a limit"])
def test_port_of_the_guest_is_reached_in_time(tmp_path: Path, timeout_s: float) -> None:
    path = tmp_path / "device"
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        connecting = pool.submit(connect_guest, Address.hybrid(str(path)), "vsock:5", timeout_s=timeout_s)
        device, _ = listener.accept()
        with device:
            device.settimeout(DEADLINE_S)
            assert device.recv(64) == b"CONNECT 5\n"
            device.sendall(b"OK 1\n")
            fd, rest = connecting.result(DEADLINE_S)
            os.close(fd)
    assert rest == b""
