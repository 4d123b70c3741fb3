"""A client and a server joined in memory: no sockets, and every byte can be looked at, split or held back."""

from typing import Any

from vshd.wire.client import ClientConnection
from vshd.wire.connection import Connection, default_limits
from vshd.wire.events import Data, Event
from vshd.wire.messages import Extended, SetupConnectionRequest
from vshd.wire.proof import Proof
from vshd.wire.server import ServerConnection

# Stands for new default limits: those of a connection may be changed.
DEFAULT = Extended()


class Joined:
    """`seen` are the events of both sides as (side, name, fields), in order."""

    def __init__(
        self,
        client: Extended | None = DEFAULT,
        server: Extended | None = DEFAULT,
        chunk: int | None = None,
        proofs: tuple[Proof | None, Proof | None] = (None, None),
        **server_options: Any,
    ) -> None:
        """proofs: of the client and of the server."""
        self.client = ClientConnection(default_limits() if client is DEFAULT else client, proofs[0])
        limits = default_limits() if server is DEFAULT else server
        self.server = ServerConnection(limits, proofs[1], **server_options)
        self.chunk = chunk
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        self.to_client = b""
        self.to_server = b""
        # Whether data counts as consumed the moment it arrives.
        self.consumes = True

    def open(self, **fields: Any) -> SetupConnectionRequest:
        """Sends the setup; returns the request as the server got it."""
        self.offer(**fields)
        requests: list[SetupConnectionRequest] = [
            event[2]["request"] for event in self.seen if event[1] == "RequestReceived"
        ]
        return requests[-1]

    def offer(self, **fields: Any) -> None:
        """Sends the setup, whatever the server makes of it."""
        fields.setdefault("argv", [b"true"])
        fields.setdefault("nopty", True)
        self.client.send_setup(SetupConnectionRequest(**fields))
        self.pump()

    def establish(self, pid: int = 42, **fields: Any) -> "Joined":
        self.offer(**fields)
        self.server.accept(pid)
        self.feed(self.server, b"")
        self.pump()
        return self

    def pump(self) -> None:
        """Carries bytes both ways until neither side has any."""
        while self.client.output.size or self.server.output.size:
            self._carry(self.client, self.server)
            self._carry(self.server, self.client)

    def _carry(self, sender: Connection, receiver: Connection) -> None:
        data = sender.output.take()
        if receiver is self.client:
            self.to_client += data
        else:
            self.to_server += data
        for start in range(0, len(data), self.chunk or len(data) or 1):
            self.feed(receiver, data[start : start + (self.chunk or len(data))])

    def feed(self, receiver: Connection, data: bytes) -> None:
        self.note(receiver, receiver.receive_data(data))

    def note(self, receiver: Connection, events: list[Event]) -> None:
        side = "client" if receiver is self.client else "server"
        for event in events:
            names: tuple[str, ...] = event.__slots__
            fields: dict[str, Any] = {name: getattr(event, name) for name in names}
            if isinstance(event, Data):
                fields["data"] = bytes(event.data)
                if self.consumes:
                    receiver.consumed(event.stream, len(event.data))
                if self.seen and self.seen[-1][:2] == (side, "Data") and self.seen[-1][2]["stream"] == event.stream:
                    self.seen[-1][2]["data"] += fields["data"]
                    continue
            self.seen.append((side, type(event).__name__, fields))

    def names(self, side: str) -> list[str]:
        return [name for who, name, _ in self.seen if who == side]

    def last(self, side: str) -> tuple[str, dict[str, Any]]:
        return [(name, fields) for who, name, fields in self.seen if who == side][-1]

    def data(self, side: str, stream: int) -> bytes:
        return b"".join(
            fields["data"]
            for who, name, fields in self.seen
            if (who, name) == (side, "Data") and fields["stream"] == stream
        )
