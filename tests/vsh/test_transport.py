"""Connections to a vshd: what each refusal looks like to a person."""

import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from vsh.address import Address
from vsh.errors import VshError
from vsh.transport import LOOK_MS, open_transport, wait_until


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class AnswerHybrid(Protocol):
    """The fixture hybrid."""

    def __call__(self, reply: Iterable[bytes], *, closes: bool = True) -> str: ...


@pytest.fixture
def hybrid(tmp_path: Path) -> Iterator[AnswerHybrid]:
    """A hybrid vsock whose answer the test chooses; returns its path."""
    path = str(tmp_path / "vsock.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    threads = []

    def answer(reply: Iterable[bytes], *, closes: bool = True) -> str:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b"CONNECT 9001\n"
                for part in reply:
                    connection.sendall(part)
                if not closes:
                    connection.recv(1)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return path

    yield answer
    for thread in threads:
        thread.join()
    listener.close()


@pytest.mark.parametrize("reply", [[b"OK 1073741824\n"], [b"O", b"K ", b"12", b"\n"]])
def test_hybrid_vsock_answers_ok(hybrid: AnswerHybrid, reply: list[bytes]) -> None:
    path = hybrid(reply, closes=False)
    fd = open_transport(Address.hybrid(path), soon())
    assert not os.get_blocking(fd)
    os.close(fd)


def test_guest_that_speaks_first_is_heard(hybrid: AnswerHybrid) -> None:
    """sshd, and a server of HTTP/2: its first bytes may come with the answer's."""
    fd = open_transport(Address.hybrid(hybrid([b"OK 12\nSSH-2.0-x\r\n"], closes=False)), soon())
    assert os.read(fd, 100) == b"SSH-2.0-x\r\n"
    os.close(fd)


def test_hybrid_vsock_refuses(hybrid: AnswerHybrid) -> None:
    with pytest.raises(VshError, match="nothing listens on port 9001"):
        open_transport(Address.hybrid(hybrid([])), soon())


@pytest.mark.parametrize("reply", [[b"FULL 1024\n"], [b"F", b"ULL 10", b"24\n"]])
def test_hybrid_vsock_without_a_free_place_is_not_called_booting(hybrid: AnswerHybrid, reply: list[bytes]) -> None:
    path = hybrid(reply)
    with pytest.raises(VshError, match="all 1024 places of its vsock device are taken") as caught:
        open_transport(Address.hybrid(path), soon())
    assert "holds a place" in caught.value.hint


@pytest.mark.parametrize("reply", [b"FULL", b"FULL 1024"])
def test_hybrid_vsock_that_closes_within_its_line_refuses(hybrid: AnswerHybrid, reply: bytes) -> None:
    with pytest.raises(VshError, match="nothing listens on port 9001"):
        open_transport(Address.hybrid(hybrid([reply])), soon())


@pytest.mark.parametrize(
    "reply", [b"NO\n", b"FULLER\n", b"FULL " + b"1" * 100, b"OKAY\n", b"OK " + b"1" * 100, b"\x00\x01"]
)
def test_hybrid_vsock_that_is_none(hybrid: AnswerHybrid, reply: bytes) -> None:
    with pytest.raises(VshError, match="is no vsock of a VM"):
        open_transport(Address.hybrid(hybrid([reply])), soon())


def test_hybrid_vsock_that_does_not_answer(hybrid: AnswerHybrid) -> None:
    with pytest.raises(VshError, match="does not answer"):
        open_transport(Address.hybrid(hybrid([b"OK 1"], closes=False)), soon(0.1))


def test_no_single_wait_keeps_ctrl_c_from_its_effect() -> None:
    """A signal that comes just before poll() does not end it, so a long wait is many short ones."""
    waits: list[int] = []

    def answer_the_third(timeout_ms: int) -> list[str]:
        waits.append(timeout_ms)
        return ["ready"] if len(waits) == 3 else []

    assert wait_until(answer_the_third, soon(60)) == ["ready"]
    assert waits == [LOOK_MS] * 3


def test_wait_ends_at_its_deadline() -> None:
    assert wait_until(select.poll().poll, soon(0.05)) == []


def test_no_socket_there(tmp_path: Path) -> None:
    with pytest.raises(VshError, match="nothing listens at"):
        open_transport(Address.unix(str(tmp_path / "none")), soon())


def test_nobody_behind_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(VshError, match="nothing listens at"):
        open_transport(Address.unix(path), soon())


def test_path_too_long_for_a_socket() -> None:
    with pytest.raises(VshError, match="cannot connect"):
        open_transport(Address.unix("/" + "x" * 200), soon())


def test_descriptor_that_is_not_open() -> None:
    with pytest.raises(VshError, match="descriptor 987 is not open"):
        open_transport(Address.descriptor(987), soon())
