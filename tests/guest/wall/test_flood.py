"""Nonsense and floods against vshd: it answers none of it with a session, and still serves the host."""

import random
import socket
import struct

import pytest

from tests.guest.conftest import Run
from tests.guest.wall.inside import attacker
from tests.guest.wall.ledger import LEDGER
from vsh.registry import find_machine

ANSWER_TIMEOUT_S = 20.0
CALLERS = 200
# vshd starts a process for each caller, 0.1 s under emulation. Behind a flood, a client on a busy host waits over 30 s.
PATIENT = ("--connect_timeout", "150")
RANDOM = random.Random(4)
FIRST_WORDS = {
    "a request without its last byte": attacker.HELLO[:-1],
    "a frame longer than the limit": struct.pack("<I", 4097) + bytes(4097),
    "the largest length": b"\xff" * 4,
    "a length beyond the sign": struct.pack("<I", 0x80000000) + bytes(100),
    "a field that never ends": struct.pack("<I", 12) + b"\x0a" + b"\xff" * 11,
    "a string longer than the frame": struct.pack("<I", 3) + b"\x0a\x7f\x00",
    "a wire type that is none": struct.pack("<I", 2) + b"\x0f\x00",
    "an argument with a NUL": struct.pack("<I", 9) + b"\x2a\x05a\0b/c\x40\x01",
    "a user with a slash": struct.pack("<I", 14) + b"\x12\x0c../../../etc",
    "a client of the web": b"GET / HTTP/1.1\r\nHost: vshd\r\n\r\n",
    "a client of ssh": b"SSH-2.0-OpenSSH_9.9\r\n",
    "CONNECT without an end": b"CONNECT " + b"9" * 200,
    "CONNECT again and again": b"CONNECT 9001\n" * 20,
    "64 KiB of noise": RANDOM.randbytes(65536),
    "16 bytes of noise": RANDOM.randbytes(16),
}


@pytest.fixture
def path(ready: str) -> str:
    machine = find_machine(name=ready)
    assert machine is not None
    assert machine.vsock
    return machine.vsock


def call(path: str) -> socket.socket:
    """A connection to vshd's port, through the device."""
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(ANSWER_TIMEOUT_S)
    caller.connect(path)
    caller.sendall(b"CONNECT %d\n" % attacker.VSHD_PORT)
    answer = b""
    while not answer.endswith(b"\n"):
        byte = caller.recv(1)
        assert byte, "vshd does not accept"
        answer += byte
    assert answer.startswith(b"OK ")
    return caller


def read_all(caller: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := caller.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("name", FIRST_WORDS)
def test_nonsense_gets_no_session(path: str, name: str) -> None:
    with call(path) as caller:
        try:
            caller.sendall(FIRST_WORDS[name])
            caller.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(caller)
    result = attacker.judge(answer)
    LEDGER.add("vshd, malformed first frames", 1, result in ("served", "answered"))
    assert result in ("refused", "closed"), answer


def test_flood_of_callers_who_hang_up_leaves_vshd_serving(path: str, vsh: Run, ready: str) -> None:
    for number in range(CALLERS):
        with call(path) as caller:
            caller.sendall(RANDOM.randbytes(number))
    LEDGER.add("vshd, flood of connections", CALLERS)
    assert vsh(*PATIENT, "--vm_name", ready, "--", "echo", "alive").stdout == b"alive\n"


def test_silent_callers_at_once_leave_vshd_serving(path: str, vsh: Run, ready: str) -> None:
    callers = [call(path) for _ in range(CALLERS)]
    LEDGER.add("vshd, flood of connections", CALLERS)
    try:
        assert vsh(*PATIENT, "--vm_name", ready, "--", "echo", "alive").stdout == b"alive\n"
    finally:
        for caller in callers:
            caller.close()
