"""A guest whose maitred answers with what is no answer: our client explains it, and raises nothing else."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded

from tests.vmkit.maitred.conftest import front
from tests.vsh.live import DEADLINE_S
from vmkit.errors import MachineError
from vmkit.maitred.client import Maitred
from vmkit.maitred.messages import EXITED, SIGNALED, LaunchProcessResponse
from vsh.address import Address
from vsh.errors import VshError

Headers = list[tuple[str, str]]
HEADERS: Headers = [(":status", "200"), ("content-type", "application/grpc+proto")]
TRAILERS: Headers = [("grpc-status", "0")]
EMPTY = b"\0\0\0\0\0"


def lie(listening: socket.socket, headers: Headers, data: bytes, trailers: Headers) -> None:
    """Answers one call."""
    connection = listening.accept()[0]
    # The client may hang up first.
    with connection, suppress(OSError):
        connection.settimeout(DEADLINE_S)
        settings = H2Configuration(client_side=False, validate_outbound_headers=False, header_encoding="utf-8")
        protocol = H2Connection(settings)
        protocol.initiate_connection()
        connection.sendall(protocol.data_to_send())
        while received := connection.recv(1 << 16):
            for event in protocol.receive_data(received):
                if isinstance(event, StreamEnded):
                    protocol.send_headers(event.stream_id, headers)
                    protocol.send_data(event.stream_id, data)
                    protocol.send_headers(event.stream_id, trailers, end_stream=True)
            connection.sendall(protocol.data_to_send())


@contextmanager
def lying(folder: Path, headers: Headers, data: bytes, trailers: Headers) -> Iterator[Address]:
    with socket.socket(socket.AF_UNIX) as listening, front(folder / "vsock.sock", folder / "lies.sock") as address:
        listening.bind(str(folder / "lies.sock"))
        listening.listen()
        thread = threading.Thread(target=lie, args=(listening, headers, data, trailers))
        thread.start()
        yield address
        thread.join(DEADLINE_S)


@pytest.mark.parametrize(
    ("headers", "data", "trailers"),
    [
        pytest.param(HEADERS, b"", TRAILERS, id="no message"),
        pytest.param(HEADERS, b"\1" + EMPTY[1:], TRAILERS, id="compressed"),
        pytest.param(HEADERS, b"\0\0\0\0\7abc", TRAILERS, id="an early end"),
        pytest.param(HEADERS[1:], EMPTY, TRAILERS, id="no status"),
        pytest.param([*HEADERS, ("lie-bin", "a")], EMPTY, TRAILERS, id="no base64"),
        pytest.param(HEADERS, EMPTY, [*TRAILERS, ("lie-bin", "\u00fc")], id="no ASCII"),
    ],
)
def test_answer_that_is_none_is_explained(
    tmp_path: Path, headers: Headers, data: bytes, trailers: Headers, caplog: pytest.LogCaptureFixture
) -> None:
    with lying(tmp_path, headers, data, trailers) as address, Maitred(address, timeout_s=DEADLINE_S) as client:
        with pytest.raises(VshError, match=r"answered GetAvailableSpace with what is no answer|ended during Get"):
            client.get_available_space()
        client.close()
    # asyncio's words for what nobody catches would reach the terminal.
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (EXITED, 256, "status 256"),
        (EXITED, -1, "status -1"),
        (SIGNALED, 0, "signal 0"),
        (SIGNALED, 65, "signal 65"),
        (SIGNALED, -9, "signal -9"),
    ],
)
def test_exit_that_no_process_can_have_is_a_fault(tmp_path: Path, status: int, code: int, words: str) -> None:
    """A program may end with what launch_process() returns: 256 and "killed by 0" would pass for success."""
    message = LaunchProcessResponse(status, code).encode()
    data = b"\0" + len(message).to_bytes(4, "big") + message
    with lying(tmp_path, HEADERS, data, TRAILERS) as address, Maitred(address, timeout_s=DEADLINE_S) as client:
        with pytest.raises(MachineError, match=f"the exit {words} of true, which no process can have"):
            client.launch_process(["true"], wait_for_exit=True)
        client.close()
