"""The client's side of a connection: sends the setup, follows the server to the end of the session."""

from vshd.wire import messages, state
from vshd.wire.connection import MAX_DATA_RANGE, VERSION, Connection, clamp
from vshd.wire.errors import LocalProtocolError, RemoteProtocolError
from vshd.wire.events import Distrusted, Established, Exited, Failed, HandedOver, Positioned, Refused
from vshd.wire.frames import LEGACY_MAX_PAYLOAD, DataPiece
from vshd.wire.messages import (
    ConnectionStatusMessage,
    Extended,
    GuestMessage,
    HostMessage,
    PositionMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
    WindowResizeMessage,
)
from vshd.wire.requests import (
    Attach,
    Clock,
    Cores,
    Forward,
    Freeze,
    Lasting,
    Logs,
    Ports,
    PowerOff,
    Share,
    Subsystem,
    Thaw,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.wire.proof import Proof

# The stub of a deferred request (2.3): refused by every legacy server, on every path, before anything runs.
STUB_USER = b":vsh-extended"
STUB_ARGV = b"/nonexistent/vsh-extended"
# `nopty` with its default value: a request of no bytes could not be announced.
EMPTY_REQUEST = bytes((8 << 3, 0))
# Of a request: what it asks for instead of a command.
SERVICE_FIELDS = (
    *("forward", "freeze", "thaw", "clock", "subsystem", "lasting", "power_off"),
    *("ports", "logs", "share", "cores", "units"),
)


def make_service_request(
    *,
    forward: Forward | None = None,
    freeze: Freeze | None = None,
    thaw: Thaw | None = None,
    clock: Clock | None = None,
    subsystem: Subsystem | None = None,
    lasting: Lasting | None = None,
    attach: Attach | None = None,
    power_off: PowerOff | None = None,
    logs: Logs | None = None,
    ports: Ports | None = None,
    share: Share | None = None,
    cores: Cores | None = None,
) -> SetupConnectionRequest:
    """A request for a service (3 to 8), which servers that do not know it refuse as they refuse the stub."""
    request = SetupConnectionRequest(
        target=messages.VM_SHELL, user=STUB_USER, argv=[STUB_ARGV], nopty=True, forward=forward
    )
    request.freeze = freeze
    request.thaw = thaw
    request.clock = clock
    request.subsystem = subsystem
    request.lasting = lasting
    request.attach = attach
    request.power_off = power_off
    request.logs = logs
    request.ports = ports
    request.share = share
    request.cores = cores
    return request


class ClientConnection(Connection):
    """Invariant: `_deferred` holds the request's bytes exactly while the server has not yet been asked to take them; a
    server that must prove a token is asked only once it has."""

    SEND_STREAMS = (messages.STDIN,)
    RECEIVE_STREAMS = (messages.STDOUT, messages.STDERR)
    STATES = state.CLIENT
    OUTGOING = GuestMessage
    INCOMING = HostMessage

    def __init__(self, limits: Extended | None, proof: "Proof | None" = None) -> None:
        """proof: of the machine's token; the server must prove it, too, and legacy mode cannot."""
        super().__init__(state.OPENING, limits, proof)
        self._deferred = b""
        self._is_service = False
        self._is_attached = False
        # Of a lasting session: where the output goes on that has not come yet, and how much was dropped before it.
        self.offset = 0
        self.dropped = 0

    def send_setup(self, request: SetupConnectionRequest) -> None:
        """Opens the session; a request that does not fit is deferred, and every one to a server that must prove itself.

        Raises LocalProtocolError when it would have to be and we speak legacy mode only.
        """
        request.extended = None
        plain = request.encode()
        request.extended = self.limits
        payload = request.encode()
        is_deferred = len(payload) > LEGACY_MAX_PAYLOAD or self.proof is not None
        if is_deferred and self.limits is None:
            raise LocalProtocolError(f"Serialized message too large: {len(payload)}")
        self._step(state.SEND_SETUP)
        self._is_service = any(getattr(request, name) is not None for name in SERVICE_FIELDS)
        self._is_attached = request.attach is not None
        if is_deferred:
            self._deferred = plain or EMPTY_REQUEST
            payload = self._stub(len(self._deferred))
            if self.proof is not None:
                self.proof.bind(payload)
        self._send_payload(payload)

    def can_signal(self, number: int) -> bool:
        """Whether the protocol has a message for this signal: legacy mode has four."""
        return number in messages.LEGACY_SIGNALS or (self.is_extended and 0 < number <= messages.SIGNAL_MAX)

    def send_signal(self, number: int) -> bool:
        """Sends a signal to the target; False when legacy mode has no message for it."""
        if self.state != state.RUNNING:
            return False
        if number in messages.LEGACY_SIGNALS:
            self._send(messages.SIGNAL, number)
        elif self.is_extended and 0 < number <= messages.SIGNAL_MAX:
            self._send(messages.SIGNAL_NUMBER, number)
        else:
            return False
        return True

    def send_resize(self, rows: int, cols: int, xpixels: int = 0, ypixels: int = 0) -> None:
        """The terminal's size in characters, and in pixels where it knows them."""
        pixels = (xpixels, ypixels) if self.is_extended else (0, 0)
        if self.state == state.RUNNING:
            self._send(messages.RESIZE_MESSAGE, WindowResizeMessage(rows, cols, *pixels))

    def send_hold(self) -> None:
        """We are about to be stopped: our silence means nothing."""
        if self.is_extended and not self.is_finished:
            self._send(messages.HOLD, True)

    def _stub(self, request_size: int) -> bytes:
        limits = self.limits
        assert limits is not None
        offer = Extended(
            version=limits.version,
            features=limits.features,
            max_data=limits.max_data,
            window=limits.window,
            silence_ms=limits.silence_ms,
            request_size=request_size,
            nonce=self.proof.nonce if self.proof is not None else b"",
        )
        return SetupConnectionRequest(
            target=messages.VM_SHELL, user=STUB_USER, argv=[STUB_ARGV], nopty=True, extended=offer
        ).encode()

    def _receive_payload(self, payload: bytes) -> None:
        if self.state == state.AWAITING_RESPONSE:
            response = SetupConnectionResponse()
            response.merge(payload)
            self._receive_response(response, payload)
            return
        message = HostMessage()
        message.merge(payload)
        if message.member == messages.STATUS_MESSAGE:
            assert isinstance(message.value, ConnectionStatusMessage)
            self._receive_status(message.value)
        elif self.state == state.AWAITING_PROOF:
            self._receive_proof(message)
        elif self.state == state.DEFERRED:
            if message.member == messages.STARTED:
                assert isinstance(message.value, SetupConnectionResponse)
                self._receive_verdict(message.value)
        elif message.member == messages.STARTED:
            raise RemoteProtocolError("a second response")
        elif message.member == messages.PROOF and self.is_extended:
            raise RemoteProtocolError("a proof at the wrong time")
        elif message.member == messages.POSITION and self._is_attached:
            assert isinstance(message.value, PositionMessage)
            self._receive_position(message.value)
        else:
            self._receive_common(message)

    def _receive_position(self, position: PositionMessage) -> None:
        self.offset = position.offset
        self.dropped += position.dropped
        self._events.append(Positioned(position.offset, position.dropped, position.has_pty))

    def _receive_piece(self, piece: DataPiece) -> None:
        super()._receive_piece(piece)
        self.offset += len(piece.data)

    def took(self, stream: int, size: int) -> None:
        super().took(stream, size)
        self.offset += size

    def _receive_response(self, response: SetupConnectionResponse, payload: bytes) -> None:
        answer = response.extended if self.limits is not None else None
        if answer is not None and 0 < answer.version <= VERSION:
            self._extend(answer)
        if self.proof is not None:
            self._receive_challenge(response, payload)
        elif not self._deferred:
            self._receive_verdict(response)
        elif response.status != messages.READY:
            is_too_long = not self.is_extended
            self._refuse(response, is_too_long)
        elif not self.is_extended:
            raise RemoteProtocolError("a legacy server took the stub of a deferred request")
        else:
            self._send_deferred()

    def _receive_challenge(self, response: SetupConnectionResponse, payload: bytes) -> None:
        """The server knows of tokens, or is not the one we look for."""
        proof = self.proof
        answer = self.peer
        assert proof is not None
        if answer is None:
            self._distrust("it speaks ChromeOS's protocol, which knows no tokens", _text(response.description))
        elif response.status != messages.READY:
            self._refuse(response, False)
        elif not answer.nonce:
            self._distrust("it has no token")
        elif len(answer.nonce) != len(proof.nonce):
            raise RemoteProtocolError(f"a nonce of {len(answer.nonce)} bytes")
        else:
            proof.bind(payload)
            self._step(state.CHALLENGE)

    def _receive_proof(self, message: HostMessage) -> None:
        if message.member == messages.ALIVE:
            return
        if message.member != messages.PROOF:
            raise RemoteProtocolError("a message before the proof")
        proof = self.proof
        assert proof is not None and isinstance(message.value, bytes)
        if not proof.is_peers(message.value):
            self._distrust("its proof is wrong")
            return
        self._admit_large_frames()
        self._send(messages.PROOF, proof.make())
        self._send_deferred()

    def _distrust(self, reason: str, said: str = "") -> None:
        """Not the machine we look for: it gets not another byte."""
        self.state = state.BROKEN
        self._deferred = b""
        self._events.append(Distrusted(reason, said))

    def _send_deferred(self) -> None:
        self._step(state.GO_ON)
        assert self.peer is not None
        size = clamp(self.peer.max_data, MAX_DATA_RANGE)
        for start in range(0, len(self._deferred), size):
            self._send(messages.REQUEST_CHUNK, self._deferred[start : start + size])
        self._deferred = b""

    def _receive_verdict(self, response: SetupConnectionResponse) -> None:
        if response.status == messages.READY and self._is_service:
            if not self.is_extended:
                raise RemoteProtocolError("a legacy server took a service for a command")
            self._step(state.HAND_OVER)
            self._events.append(HandedOver(_text(response.description)))
        elif response.status == messages.READY:
            self._step(state.ACCEPT)
            self._events.append(Established(response.pid, self.is_extended))
        else:
            self._refuse(response, False)

    def _refuse(self, response: SetupConnectionResponse, is_too_long: bool) -> None:
        self._step(state.REFUSE)
        failure = response.extended.failure if response.extended is not None else None
        self._events.append(Refused(_text(response.description), failure, is_too_long))

    def _receive_status(self, status: ConnectionStatusMessage) -> None:
        if status.status == messages.READY:
            return
        if status.status == messages.EXITED and self.state == state.RUNNING:
            if self.is_extended and not all(s.is_ended or s.is_closed for s in self.receiving.values()):
                raise RemoteProtocolError("the target's exit before the end of its output")
            self._step(state.END)
            self._events.append(Exited(status.code, status.signal, status.core_dumped))
            return
        self._step(state.END)
        reason = _text(status.description) or f"vsh connection has exited abnormally: {status.status}"
        self._events.append(Failed(reason, status.failure))

    def _incoming_stream(self, number: int) -> int | None:
        if number in self.receiving:
            return number
        if self.is_extended:
            raise RemoteProtocolError(f"data on stream {number}, which goes the other way")
        return None


def _text(data: bytes) -> str:
    """A peer's words, safe to show: no control characters."""
    return "".join(c if c.isprintable() else "?" for c in data.decode("utf-8", "replace"))
