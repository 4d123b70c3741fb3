"""Files of a guest as file objects, with a real vshd, and with a server that lies."""

import io
import os
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vsh.live import DEFAULT_USER, Vshd
from vsh.address import Address
from vsh.client import Client
from vsh.errors import ConnectionLost, ExecError, UsageError, VshError
from vsh.remotefile import CHUNK_SIZE, RemoteFile, _Requests


@pytest.fixture
def client(vshd: Vshd) -> Client:
    return Client(Address.unix(str(vshd.path)))


def test_data_goes_in_and_out(client: Client, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_SIZE + 17)
    path = str(tmp_path / "file")
    with nothing_left_open():
        with client.open(path, "wb") as file:
            assert file.write(data) == len(data)
        assert Path(path).read_bytes() == data
        with client.open(path, "rb") as file:
            assert file.read() == data
        with client.open(os.fsencode(path)) as file:
            file.seek(-20, os.SEEK_END)
            assert (file.tell(), file.read(5), file.read()) == (len(data) - 20, data[-20:-15], data[-15:])
            file.seek(CHUNK_SIZE - 3)
            assert file.read(6) == data[CHUNK_SIZE - 3 : CHUNK_SIZE + 3]
            assert file.read(0) == b""


def test_text_has_an_encoding(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "text"
    with client.open(str(path), "w", encoding="utf-8") as file:
        print("first é", file=file)
        print("second", file=file)
    with client.open(str(path), "a", encoding="utf-8", newline="\r\n") as file:
        file.write("third\n")
    assert path.read_bytes() == "first é\nsecond\nthird\r\n".encode()
    with client.open(str(path), encoding="ascii", errors="replace") as file:
        assert [line.strip() for line in file] == [
            "first \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}",
            "second",
            "third",
        ]
    with nothing_left_open(), pytest.raises(LookupError):
        client.open(str(path), encoding="no-such")


def test_modes_are_those_of_open(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with client.open(str(path), "xb") as file:
        file.write(b"one")
        with pytest.raises(io.UnsupportedOperation):
            file.read()
    with pytest.raises(FileExistsError):
        client.open(str(path), "x")
    with client.open(str(path), "ab") as file:
        assert file.tell() == 3
        file.write(b" two")
    with client.open(str(path), "r+b") as file:
        assert file.read(3) == b"one"
        file.seek(0)
        file.write(b"ONE")
        file.seek(0)
        assert file.read() == b"ONE two"
        file.truncate(3)
    assert path.read_bytes() == b"ONE"
    with client.open(str(path)) as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"")
    with client.open(str(path), "w"):
        pass
    assert path.read_bytes() == b""


def test_errors_are_those_of_open(client: Client, tmp_path: Path) -> None:
    with nothing_left_open():
        with pytest.raises(FileNotFoundError) as caught:
            client.open(str(tmp_path / "none"))
        assert caught.value.filename == str(tmp_path / "none")
        with pytest.raises(IsADirectoryError):
            client.open(str(tmp_path), "w")
        with pytest.raises(IsADirectoryError), client.open(str(tmp_path)) as file:
            file.read()
        for mode in ("", "rw", "q", "rt", "b"):
            with pytest.raises(UsageError, match="has no mode"):
                client.open(str(tmp_path / "f"), mode)
        with pytest.raises(UsageError, match="takes no encoding"):
            client.open(str(tmp_path / "f"), "wb", encoding="utf-8")
        with pytest.raises(ExecError):
            client.open(str(tmp_path / "f"), "w", user="nosuchuser")


def test_file_that_cannot_be_written_is_an_error_of_close(client: Client) -> None:
    file = client.open("/dev/full", "wb", user=DEFAULT_USER)
    file.write(b"data")
    with pytest.raises(OSError, match="No space left on device"):
        file.close()
    assert file.closed


def test_closed_file_refuses_its_calls(client: Client, tmp_path: Path) -> None:
    file = client.open(str(tmp_path / "f"), "w+b")
    file.close()
    file.close()
    for call in (file.read, file.tell, lambda: file.write(b"x"), lambda: file.seek(0)):
        with pytest.raises(ValueError, match="closed file"):
            call()
    assert stat.S_ISREG((tmp_path / "f").stat().st_mode)


def frame(kind: int, body: bytes) -> bytes:
    return struct.pack(">IB", len(body) + 1, kind) + body


VERSION = frame(2, struct.pack(">I", 3))
OPENED = frame(102, struct.pack(">II", 1, 1) + b"h")


@pytest.mark.parametrize(
    ("answers", "kind", "text"),
    [
        (b"", ConnectionLost, "ended the connection"),
        (frame(101, bytes(4)), VshError, "did not greet"),
        (struct.pack(">I", 1 << 30), VshError, "a packet of 1073741824 bytes"),
        (VERSION + frame(102, struct.pack(">II", 9, 1) + b"h"), VshError, "did not send"),
        (VERSION + frame(102, struct.pack(">II", 1, 0)), VshError, "a handle of 0 bytes"),
        (VERSION + frame(102, struct.pack(">II", 1, 300) + b"h"), VshError, "too short"),
        (VERSION + frame(102, b"\0"), VshError, "did not send"),
        (VERSION + frame(101, struct.pack(">II", 1, 0)), VshError, "answered request 3 with packet 101"),
        (VERSION + frame(101, struct.pack(">II", 1, 4)), OSError, "Input/output error"),
        (VERSION + OPENED + frame(103, struct.pack(">II", 2, 200) + bytes(200)), VshError, "200 bytes for a read of 9"),
        (VERSION + OPENED + frame(103, struct.pack(">II", 2, 0)), VshError, "0 bytes for a read"),
        (VERSION + OPENED + frame(105, bytes(4)), VshError, "did not send"),
        (VERSION + OPENED, ConnectionLost, "ended the connection"),
    ],
)
def test_server_that_lies_is_an_error(answers: bytes, kind: type[Exception], text: str) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(answers)
    theirs.shutdown(socket.SHUT_WR)
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: theirs.recv(4096), b"")])
    reader.start()
    try:
        with pytest.raises(kind, match=text):
            RemoteFile(_Requests(ours), b"/f", 1).readinto(bytearray(9))
    finally:
        ours.close()
        reader.join()
        theirs.close()


def test_lost_file_is_closed_without_another_error() -> None:
    """The read has raised it. A file that is only dropped would print it once more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(VERSION + OPENED)
        theirs.shutdown(socket.SHUT_WR)
        file = RemoteFile(_Requests(ours), b"/f", 1)
        with pytest.raises(ConnectionLost):
            file.readinto(bytearray(9))
        file.close()
        assert file.closed
