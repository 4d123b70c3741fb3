"""A client and a server joined in memory: no sockets, and every byte can be looked at, split or held back."""

from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.events import Data
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.server import ServerConnection

DEFAULT = object()


class Joined:
    """`seen` are the events of both sides as (side, name, fields), in order."""

    def __init__(self, client=DEFAULT, server=DEFAULT, chunk=None, proofs=(None, None), **server_options):
        """proofs: of the client and of the server."""
        self.client = ClientConnection(default_limits() if client is DEFAULT else client, proofs[0])
        limits = default_limits() if server is DEFAULT else server
        self.server = ServerConnection(limits, proofs[1], **server_options)
        self.chunk = chunk
        self.seen = []
        self.to_client = b""
        self.to_server = b""
        # Whether data counts as consumed the moment it arrives.
        self.consumes = True

    def open(self, **fields):
        """Sends the setup; returns the request as the server got it."""
        fields.setdefault("argv", [b"true"])
        fields.setdefault("nopty", True)
        self.client.send_setup(SetupConnectionRequest(**fields))
        self.pump()
        requests = [event[2]["request"] for event in self.seen if event[1] == "RequestReceived"]
        return requests[-1] if requests else None

    def establish(self, pid=42, **fields):
        self.open(**fields)
        self.server.accept(pid)
        self.feed(self.server, b"")
        self.pump()
        return self

    def pump(self):
        """Carries bytes both ways until neither side has any."""
        while self.client.output.size or self.server.output.size:
            self._carry(self.client, self.server)
            self._carry(self.server, self.client)

    def _carry(self, sender, receiver):
        data = sender.output.take()
        if receiver is self.client:
            self.to_client += data
        else:
            self.to_server += data
        for start in range(0, len(data), self.chunk or len(data) or 1):
            self.feed(receiver, data[start : start + (self.chunk or len(data))])

    def feed(self, receiver, data):
        self.note(receiver, receiver.receive_data(data))

    def note(self, receiver, events):
        side = "client" if receiver is self.client else "server"
        for event in events:
            fields = {name: getattr(event, name) for name in event.__slots__}
            if isinstance(event, Data):
                fields["data"] = bytes(event.data)
                if self.consumes:
                    receiver.consumed(event.stream, len(event.data))
                if self.seen and self.seen[-1][:2] == (side, "Data") and self.seen[-1][2]["stream"] == event.stream:
                    self.seen[-1][2]["data"] += fields["data"]
                    continue
            self.seen.append((side, type(event).__name__, fields))

    def names(self, side):
        return [name for who, name, _ in self.seen if who == side]

    def last(self, side):
        return [(name, fields) for who, name, fields in self.seen if who == side][-1]

    def data(self, side, stream):
        return b"".join(
            fields["data"]
            for who, name, fields in self.seen
            if (who, name) == (side, "Data") and fields["stream"] == stream
        )
