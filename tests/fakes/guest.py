"""A guest without a kernel for the fake QEMU: it takes the place of the machine's vsock device, and serves a freeze and
a thaw as vshd does (docs/reference/protocol.md 5), with vshd's own side of the protocol. All else it refuses.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vshd.carry.conduit import write_output
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.events import RequestReceived
from vshd.wire.messages import Failure, SetupConnectionRequest
from vshd.wire.proof import NONCE_BYTES, SERVER, Proof
from vshd.wire.server import ServerConnection

WORD_BYTES = 8


class Guest:
    """Invariant: `secret` is that of the freeze while the guest is frozen, else empty."""

    def __init__(self, path: str, secret: bytes, on_thaw: Callable[[], None]) -> None:
        """path: of the machine's hybrid vsock. secret: of the saved guest; empty for one that booted."""
        self.secret = secret
        self._on_thaw = on_thaw
        Path(path).unlink()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        Path(path).chmod(0o600)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock:
                line = sock.makefile("rb", buffering=0).readline()
                sock.sendall(line.replace(b"CONNECT", b"OK"))
                self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        proof = Proof(SERVER, self.secret, os.urandom(NONCE_BYTES)) if self.secret else None
        connection = ServerConnection(default_limits(), proof)
        request = None
        while request is None:
            data = sock.recv(1 << 16)
            if not data:
                return
            request = _find_request(connection, data)
            _flush(sock, connection)
        if request.freeze is not None:
            connection.hand_over(1, b"")
            self.secret = request.freeze.secret
        elif request.thaw is not None:
            self._on_thaw()
            connection.hand_over(1, b"WALL_TRANSPORT=on WALL_DAEMON=on WALL_KERNEL=on")
        else:
            connection.refuse("this guest runs nothing", Failure(messages.OTHER))
        _flush(sock, connection)
        while request.thaw is not None and (word := sock.recv(WORD_BYTES, socket.MSG_WAITALL)):
            sock.sendall(time.time_ns().to_bytes(WORD_BYTES, "little") if any(word) else word)


def _find_request(connection: ServerConnection, data: bytes) -> SetupConnectionRequest | None:
    for event in connection.receive_data(data):
        if isinstance(event, RequestReceived):
            return event.request
    return None


def _flush(sock: socket.socket, connection: ServerConnection) -> None:
    while connection.output.size:
        write_output(connection.output, sock.fileno())
