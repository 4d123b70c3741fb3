"""What another program of the guest does at the port that a container's vshd is awaited at: KIND PLACE COUNT.

It calls COUNT times, says its piece each time, and goes to the background with all of it held open. Used as a script.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable

from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.frames import encode_frame
from vshd.wire.messages import ConnectionStatusMessage, HostMessage, SetupConnectionResponse
from vshd.wire.proof import NONCE_BYTES, SERVER, TOKEN_BYTES, Proof
from vshd.wire.server import ServerConnection

DEADLINE_S = 60.0
EXITED = HostMessage(messages.STATUS_MESSAGE, ConnectionStatusMessage(messages.EXITED, b"", 0)).encode()


def say_nothing(connection: socket.socket) -> None:
    pass


def leave(connection: socket.socket) -> None:
    connection.close()


def say_nonsense(connection: socket.socket) -> None:
    connection.sendall(os.urandom(100))


def send_too_much(connection: socket.socket) -> None:
    connection.sendall(bytes(1 << 20))


def play_legacy_server(connection: socket.socket) -> None:
    """Takes the request if it gets it, and says that all went well."""
    response = SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, 42).encode()
    connection.sendall(encode_frame(response, 4096) + encode_frame(EXITED, 4096))


def play_server_without_token(connection: socket.socket) -> None:
    serve(connection, ServerConnection(default_limits()))


def play_server_with_another_token(connection: socket.socket) -> None:
    proof = Proof(SERVER, os.urandom(TOKEN_BYTES), os.urandom(NONCE_BYTES))
    serve(connection, ServerConnection(default_limits(), proof))


def reflect(connection: socket.socket) -> None:
    """Whatever comes, back to where it came from."""
    connection.settimeout(DEADLINE_S)
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def serve(connection: socket.socket, server: ServerConnection) -> None:
    connection.settimeout(DEADLINE_S)
    server.receive_data(connection.recv(1 << 16))
    if server.state == "preparing":
        server.accept(42)
    connection.sendall(server.output.take())
    if data := connection.recv(1 << 16):
        print("a stranger was sent more than the stub:", data, file=sys.stderr)


def call(kind: Callable[[socket.socket], None], place: str) -> socket.socket:
    connection = socket.socket(socket.AF_VSOCK if place.startswith("vsock:") else socket.AF_UNIX)
    connection.settimeout(DEADLINE_S)
    _, *words = place.split(":")
    connection.connect(words[0] if len(words) == 1 else (int(words[0]), int(words[1])))
    # One that is turned away has nothing more to say.
    with contextlib.suppress(OSError):
        kind(connection)
    return connection


KINDS = {
    kind.__name__: kind
    for kind in (
        say_nothing,
        leave,
        say_nonsense,
        send_too_much,
        play_legacy_server,
        play_server_without_token,
        play_server_with_another_token,
        reflect,
    )
}


def main() -> None:
    name, place, count = sys.argv[1:]
    held = [call(KINDS[name], place) for _ in range(int(count))]
    if os.fork():
        return
    for connection in held:
        try:
            while connection.fileno() >= 0 and connection.recv(1 << 16):
                pass
        except OSError:
            pass


if __name__ == "__main__":
    main()
