"""A branch: one more connection of a forward, to the process that serves all of them (docs/reference/protocol.md 3.4).

    client's secret ->   <- server's secret   go ->   <- response   bytes <->

Owns the order of these, for both sides, without I/O. The two secrets came over the forward's first connection, whose
peers have proven themselves; so a program that has a port of the same number learns nothing that is of use.
"""

from vshd.wire.errors import RemoteProtocolError
from vshd.wire.frames import LEGACY_MAX_PAYLOAD, encode_frame
from vshd.wire.messages import FAILED, READY, READY_DESCRIPTION, Extended, Failure, SetupConnectionResponse
from vshd.wire.proof import is_same

SECRET_SIZE = 32
# The client's secret, and behind it the server's.
TOKEN_SIZE = 2 * SECRET_SIZE
GO = b"\x01"
# Behind GO, before the response: what a side keeps of it at most.
EARLY_MAX = 1 << 14
_HEAD_SIZE = 4


class ServerBranch:
    """The server's side. Invariant: `rest` is what came behind GO, and `is_asked` says whether GO came."""

    __slots__ = ("_data", "_token", "is_asked", "is_proven", "rest")

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._data = b""
        self.is_proven = False
        self.is_asked = False
        self.rest = b""

    @property
    def wanted(self) -> int:
        """How much to receive at most: of a client that has proven nothing, no more than the proof."""
        return EARLY_MAX if self.is_proven else SECRET_SIZE - len(self._data)

    def receive_data(self, data: bytes) -> bytes:
        """What to send now. Raises RemoteProtocolError for a client without the secret, or out of order."""
        answer = b""
        if not self.is_proven:
            self._data += data
            if len(self._data) < SECRET_SIZE:
                return b""
            if not is_same(self._data[:SECRET_SIZE], self._token[:SECRET_SIZE]):
                raise RemoteProtocolError("a branch without the client's secret")
            self.is_proven = True
            answer, data = self._token[SECRET_SIZE:], self._data[SECRET_SIZE:]
        if data and not self.is_asked:
            if not data.startswith(GO):
                raise RemoteProtocolError("a branch that begins with anything but GO")
            self.is_asked = True
            data = data[len(GO) :]
        self.rest += data
        return answer


class ClientBranch:
    """The client's side. Invariant: `rest` is what came behind the response."""

    __slots__ = ("_data", "_token", "is_proven", "rest")

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._data = b""
        self.is_proven = False
        self.rest = b""

    @property
    def secret(self) -> bytes:
        """What to send first. GO follows once the server has proven itself, and the client's bytes may follow GO."""
        return self._token[:SECRET_SIZE]

    def receive_proof(self, data: bytes) -> bool:
        """Whether the server has proven itself by now. Raises RemoteProtocolError for one that cannot."""
        self._data += data
        if len(self._data) < SECRET_SIZE:
            return False
        if not is_same(self._data, self._token[SECRET_SIZE:]):
            raise RemoteProtocolError("a server without its secret")
        self._data = b""
        self.is_proven = True
        return True

    def receive_data(self, data: bytes) -> SetupConnectionResponse | None:
        """The response, once it is whole. Raises RemoteProtocolError."""
        self._data += data
        if len(self._data) < _HEAD_SIZE:
            return None
        end = _HEAD_SIZE + int.from_bytes(self._data[:_HEAD_SIZE], "little")
        if end > _HEAD_SIZE + LEGACY_MAX_PAYLOAD:
            raise RemoteProtocolError("a response of more than 4096 bytes")
        if len(self._data) < end:
            return None
        response = SetupConnectionResponse()
        response.merge(self._data[_HEAD_SIZE:end])
        self.rest = self._data[end:]
        return response


def encode_acceptance() -> bytes:
    """The response of a branch that is connected."""
    return encode_frame(SetupConnectionResponse(READY, READY_DESCRIPTION).encode(), LEGACY_MAX_PAYLOAD)


def encode_refusal(description: bytes, failure: Failure) -> bytes:
    """The response of a branch that is not."""
    response = SetupConnectionResponse(FAILED, description, extended=Extended(failure=failure))
    return encode_frame(response.encode(), LEGACY_MAX_PAYLOAD)
