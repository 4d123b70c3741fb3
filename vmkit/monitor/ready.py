"""Receives the READY message: the guest sends `READY=1` (sd_notify's words) once vshd listens.

The same message first gives the state of each layer of the wall (`WALL_KERNEL=on`). The monitor binds the port before
QEMU starts, and never polls for the message.

On `user` the device process admits only the guest's CID and privileged source ports (below 1024) to it. On `vhost`
every machine shares the host's ports, so the port is the machine's own, and the peer's CID and source port are checked
here.
"""

import asyncio
import os
import socket

from vmkit.errors import MachineError
from vmkit.machine.hardware import USER_READY_PORT
from vmkit.machine.launch import LaunchPlan
from vsh.text import clean_line
from vsh.transport import listen_vsock

READY_WORD = b"READY=1"
WALL_WORD = b"WALL_"
INIT_WORD = b"INIT="
# Of a root of the user's: vshd.pid1.system says it.
INITS = (b"systemd",)
WALL_LAYERS = ("transport", "daemon", "kernel")
# systemd's notify messages are short; a guest that sends more sends something else.
MAX_MESSAGE_BYTES = 4096
MESSAGE_DEADLINE_S = 10.0
PRIVILEGED_PORTS = 1024
# A guest that sends so many other messages will not send READY; it ends the start with a clear cause.
MAX_WRONG_MESSAGES = 64
BACKLOG = 8


def is_ready_message(message: bytes) -> bool:
    """True when one line of the message is READY=1."""
    return READY_WORD in message.split(b"\n")


def parse_wall(message: bytes) -> dict[str, str]:
    """The state of each layer that the message tells of: `on`, `off`, or `missing: REASON`.

    The guest's words, made fit for a terminal; layers that are not ours to know are left out.
    """
    wall = {}
    for line in message.split(b"\n"):
        name, equals, state = line.partition(b"=")
        layer = name.removeprefix(WALL_WORD).decode("ascii", "replace").lower()
        if name.startswith(WALL_WORD) and equals and layer in WALL_LAYERS:
            wall[layer] = clean_line(state)
    return wall


def parse_facts(message: bytes) -> dict[str, object]:
    """What the message tells of the guest, as machine.json has it: `wall`, and `init` where that is not vmkit's."""
    facts: dict[str, object] = {}
    if wall := parse_wall(message):
        facts["wall"] = wall
    for line in message.split(b"\n"):
        if line.startswith(INIT_WORD) and line.removeprefix(INIT_WORD) in INITS:
            facts["init"] = line.removeprefix(INIT_WORD).decode()
    return facts


def parse_wall_text(text: str) -> dict[str, object]:
    """The same of a thaw's answer, which has a space between the lines, and tells of the wall alone."""
    return parse_facts(text.encode().replace(b" " + WALL_WORD, b"\n" + WALL_WORD))


class ReadyListener:
    """A bound, listening socket that waits for one guest's READY."""

    def __init__(self, sock: socket.socket, port: int, cid: int | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._cid = cid
        self.port = port

    async def wait(self) -> bytes:
        """Returns the guest's message with READY. Raises MachineError when it floods the port with others."""
        for _ in range(MAX_WRONG_MESSAGES):
            with await self._accept_guest() as connection:
                message = await _read_message(connection)
                if is_ready_message(message):
                    return message
        raise MachineError("the guest floods the ready port with something that is not READY=1")

    def close(self) -> None:
        """Stops listening."""
        self._sock.close()

    async def _accept_guest(self) -> socket.socket:
        """The guest's next connection. Strangers are dropped and not counted: they must not end another's start."""
        loop = asyncio.get_running_loop()
        while True:
            connection, peer = await loop.sock_accept(self._sock)
            if self._is_guest(peer):
                return connection
            connection.close()
            # sock_accept does not wait while a connection is pending.
            await asyncio.sleep(0)

    def _is_guest(self, peer: object) -> bool:
        if self._cid is None:
            return True
        return isinstance(peer, tuple) and peer[0] == self._cid and peer[1] < PRIVILEGED_PORTS


def open_ready_listener(plan: LaunchPlan) -> ReadyListener:
    """Binds the port at which READY arrives."""
    if not plan.ready_socket:
        sock, port = listen_vsock(BACKLOG)
        return ReadyListener(socket.socket(fileno=sock.detach()), port, plan.cid)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = plan.directory / plan.ready_socket
    try:
        # That of the last boot.
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return ReadyListener(sock, USER_READY_PORT, None)


async def _read_message(connection: socket.socket) -> bytes:
    """Returns what the guest sends until it closes or has sent READY, within a limit and a deadline."""
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    message = b""
    try:
        async with asyncio.timeout(MESSAGE_DEADLINE_S):
            while len(message) < MAX_MESSAGE_BYTES and not (message.endswith(b"\n") and is_ready_message(message)):
                data = await loop.sock_recv(connection, MAX_MESSAGE_BYTES - len(message))
                if not data:
                    break
                message += data
    except (OSError, TimeoutError):
        return message
    return message
