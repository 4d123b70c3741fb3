"""maitred's server, from its first client on: who is served, and when it has nothing to do any more.

gRPC has no password here. So the server looks at each peer before it reads a byte. Over vsock it takes the host alone,
and closes every connection where the machine has a token, which only vshd can ask for. The UNIX socket's mode makes it
root's.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence

from grpclib.protocol import H2Protocol
from grpclib.server import Server

from vmkit.maitred.codec import Codec
from vmkit.maitred.guest.launching import Processes
from vmkit.maitred.guest.methods import Agent
from vmkit.maitred.guest.system import System
from vmkit.maitred.joined import join_writes
from vshd.carry.vsock import HOST_CID

# The server is 27 MiB. Without a client for so long it ends, and a small process waits for the next.
IDLE_S = 60.0


class CheckedSocket(socket.socket):
    """A listening socket that closes who may not connect. is_allowed: of the peer's address."""

    is_allowed: Callable[[object], bool] = staticmethod(lambda address: False)
    note: Callable[[], None] = staticmethod(lambda: None)

    def accept(self) -> tuple[socket.socket, object]:
        """As asyncio's server calls it. Raises BlockingIOError where none waits that is allowed."""
        connection, address = super().accept()
        if not self.is_allowed(address):
            connection.close()
            # asyncio asks again when the next one waits.
            raise BlockingIOError
        self.note()
        return connection, address


class _JoiningProtocol(H2Protocol):
    """An answer leaves in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(join_writes(transport))


class _JoiningServer(Server):
    def _protocol_factory(self) -> H2Protocol:
        plain = super()._protocol_factory()
        return _JoiningProtocol(plain.handler, plain.config, plain.h2_config)


def check_peer(address: object, is_token_demanded: Callable[[], bool]) -> bool:
    """Whether the peer of a connection may have root: address as accept() gives it."""
    if not isinstance(address, tuple):
        # A UNIX socket's mode has decided.
        return True
    return address[0] == HOST_CID and not is_token_demanded()


async def serve(
    fds: Sequence[int],
    is_token_demanded: Callable[[], bool],
    *,
    system: System | None = None,
    idle_s: float = IDLE_S,
) -> None:
    """Serves at listening sockets until it is idle. fds: theirs; they stay open."""
    loop = asyncio.get_running_loop()
    agent = Agent(system or System(), Processes(), loop.time)
    servers = []
    for fd in fds:
        listening = CheckedSocket(fileno=socket.dup(fd))
        listening.setblocking(False)
        listening.is_allowed = lambda address: check_peer(address, is_token_demanded)
        listening.note = agent.note
        server = _JoiningServer([agent], codec=Codec())
        await server.start(sock=listening)
        servers.append(server)
    try:
        while True:
            left_s = agent.last_s + idle_s - loop.time()
            if left_s <= 0 and not agent.is_needed:
                return
            await asyncio.sleep(max(left_s, idle_s / 10))
    finally:
        # Clients that are still connected see the end of this process.
        for server in servers:
            server.close()
