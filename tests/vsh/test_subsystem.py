"""A subsystem of a real vshd, as a socket and as the stdio of `vsh --subsystem`."""

import os
import pwd
import socket
import struct
import threading
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, IS_VSOCK_GUEST, StartVshd, Vshd, wait_until
from vsh.address import Address
from vsh.errors import ExecError, Unreachable, VshError
from vsh.subsystem import open_subsystem
from vshd.wire import messages
from vshd.wire.frames import encode_frame
from vshd.wire.messages import SetupConnectionRequest, SetupConnectionResponse

# INIT of version 3, and the beginning of its answer.
INIT = bytes.fromhex("00000005 01 00000003")
VERSION = bytes.fromhex("02 00000003")

pytestmark = pytest.mark.skipif(IS_VSOCK_GUEST, reason="these addresses are those of UNIX sockets")


def address_of(vshd: Vshd) -> Address:
    return Address.unix(str(vshd.path))


def greet(connection: socket.socket) -> bytes:
    connection.settimeout(DEADLINE_S)
    connection.sendall(INIT)
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    return connection.recv(size, socket.MSG_WAITALL)


def test_socket_carries_the_subsystem(vshd: Vshd) -> None:
    with open_subsystem(address_of(vshd), "sftp") as connection:
        assert connection.getblocking()
        assert greet(connection).startswith(VERSION)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    line = ": ended, 1 requests, 0 bytes read, 0 bytes written after "
    wait_until(lambda: line in vshd.log, "the log has the service's end")


def test_name_that_vshd_does_not_know_is_not_found(vshd: Vshd) -> None:
    with pytest.raises(ExecError, match="no subsystem has the name 'bogus'") as caught:
        open_subsystem(address_of(vshd), "bogus")
    assert (caught.value.kind, caught.value.status) == (messages.NOT_FOUND, 127)


def test_unknown_user_is_refused(vshd: Vshd) -> None:
    with pytest.raises(ExecError, match="could not find user: nosuchuser") as caught:
        open_subsystem(address_of(vshd), "sftp", user="nosuchuser")
    assert caught.value.kind == messages.BAD_USER


def test_user_who_may_not_log_in_is_refused(start_vshd: StartVshd) -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    other = "daemon" if own != "daemon" else "bin"
    vshd = start_vshd(f"--allow_user={own}")
    with pytest.raises(ExecError, match="not allowed to log in"):
        open_subsystem(address_of(vshd), "sftp", user=other)


def test_no_vshd_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="nothing listens"):
        open_subsystem(Address.unix(str(tmp_path / "none")), "sftp")


def test_server_without_extended_mode_serves_none(start_vshd: StartVshd) -> None:
    with pytest.raises(VshError, match="a service needs extended mode"):
        open_subsystem(address_of(start_vshd("--noextended")), "sftp")


def test_legacy_server_knows_no_subsystems(tmp_path: Path) -> None:
    """It skips the field, and finds no user of the stub's name."""

    def refuse(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            (size,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
            request = SetupConnectionRequest()
            request.merge(connection.recv(size, socket.MSG_WAITALL))
            reason = b"could not find user: " + request.user
            connection.sendall(encode_frame(SetupConnectionResponse(messages.FAILED, reason).encode(), 4096))

    path = str(tmp_path / "legacy.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = threading.Thread(target=refuse, args=(listener,))
        server.start()
        with pytest.raises(VshError, match=r"knows no subsystems: it is older than this vsh, or ChromeOS's"):
            open_subsystem(Address.unix(path), "sftp")
        server.join(DEADLINE_S)
