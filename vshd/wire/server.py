"""The server's side of a connection: takes the setup, answers it, reports what the client wants of the target."""

from vshd.wire import messages, state
from vshd.wire.connection import REQUEST_MAX, VERSION, Connection
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.events import Distrusted, Failed, Held, RequestReceived, Resized, Signalled
from vshd.wire.messages import (
    ConnectionStatusMessage,
    Extended,
    Failure,
    GuestMessage,
    HostMessage,
    PositionMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
    WindowResizeMessage,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.wire.proof import Proof


# Descriptions and subjects quote the client's words, and a response must fit LEGACY_MAX_PAYLOAD with both.
DESCRIPTION_MAX = 2048
SUBJECT_MAX = 1024


class ServerConnection(Connection):
    """Invariant: `_chunks` is the part of a deferred request that has come, never longer than announced; where a token
    is demanded nothing of it is taken before the client's proof."""

    SEND_STREAMS = (messages.STDOUT, messages.STDERR)
    RECEIVE_STREAMS = (messages.STDIN,)
    STATES = state.SERVER
    OUTGOING = HostMessage
    INCOMING = GuestMessage

    def __init__(
        self, limits: Extended | None, proof: "Proof | None" = None, *, allow_legacy_clients: bool = False
    ) -> None:
        """proof: of the token that clients must prove. allow_legacy_clients: but for those that offer nothing."""
        super().__init__(state.AWAITING_SETUP, limits, proof)
        self._allow_legacy_clients = allow_legacy_clients
        self._chunks = bytearray()
        self._request_size = 0
        self._is_deferred = False
        # A SetupConnectionResponse has been sent: what follows it are HostMessages.
        self._has_responded = False

    def accept(self, pid: int) -> None:
        """The target runs."""
        self._step(state.ACCEPT)
        self._respond(SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, pid))

    def hand_on(self) -> tuple[Extended, bool, bytes]:
        """What another process needs to adopt() the connection in place of the answer: the peer's offer, whether the
        request was deferred, and the bytes behind it."""
        assert self.peer is not None
        return self.peer, self._is_deferred, self.take_rest()

    def adopt(self, peer: Extended, is_deferred: bool, early: bytes) -> None:
        """Goes on with what another process was given by hand_on(). Answer with accept()."""
        self._extend(peer)
        self._is_deferred = self._has_responded = is_deferred
        self._step(state.ADOPT)
        self._early = early

    def send_position(self, offset: int, dropped: int, *, has_pty: bool) -> None:
        """Of a lasting session (7.3), before the byte at `offset`."""
        self._send(messages.POSITION, PositionMessage(offset, dropped, has_pty=has_pty))

    def hand_over(self, pid: int, description: bytes) -> None:
        """The forward stands: what follows the response in either direction are the bytes it carries."""
        self._step(state.HAND_OVER)
        self._respond(SetupConnectionResponse(messages.READY, description, pid))

    def refuse(self, description: str, failure: Failure) -> None:
        """Nothing was run, and the session ends."""
        self._step(state.REFUSE)
        self._respond(SetupConnectionResponse(messages.FAILED, _quote(description)), failure)

    def send_exit(self, code: int, *, signal: int = 0, core_dumped: bool = False) -> None:
        """The target ended, and all its output is sent. In extended mode the streams must be ended."""
        status = ConnectionStatusMessage(messages.EXITED, messages.EXITED_DESCRIPTION, code)
        if self.is_extended:
            status.signal = signal
            status.core_dumped = core_dumped
        self._step(state.END)
        self._send(messages.STATUS_MESSAGE, status)

    def send_failure(self, description: str, failure: Failure) -> None:
        """Ends the session for a reason of ours or a fault of the peer; a response when none was given yet."""
        if self.state in (state.AWAITING_SETUP, state.PREPARING):
            self.refuse(description, failure)
        elif self.state in (state.RUNNING, state.AWAITING_PROOF, state.DEFERRED, state.BROKEN):
            text = _quote(description)
            if self._has_responded:
                status = ConnectionStatusMessage(messages.FAILED, text)
                if self.is_extended:
                    status.failure = failure
                self._send(messages.STATUS_MESSAGE, status)
            elif self.is_extended:
                self._respond(SetupConnectionResponse(messages.FAILED, text), failure)
            # Otherwise the first message was no request: its sender may speak no protocol of ours, and gets no answer.
            self.state = state.OVER

    def _respond(self, response: SetupConnectionResponse, failure: Failure | None = None) -> None:
        if self.is_extended:
            response.extended = self._answer(failure)
        if self._is_deferred:
            if failure is None:
                response.extended = None
            self._send(messages.STARTED, response)
        else:
            self._send_response(response.encode())

    def _send_response(self, payload: bytes) -> None:
        self._has_responded = True
        self._send_payload(payload)

    def _answer(self, failure: Failure | None) -> Extended:
        limits = self.limits
        assert limits is not None and self.peer is not None
        if failure is not None:
            failure = Failure(failure.kind, failure.error, failure.subject[:SUBJECT_MAX])
        return Extended(
            version=min(VERSION, self.peer.version),
            features=limits.features & self.peer.features,
            max_data=limits.max_data,
            window=limits.window,
            silence_ms=limits.silence_ms,
            failure=failure,
            nonce=self.proof.nonce if self.proof is not None and failure is None else b"",
        )

    def _receive_payload(self, payload: bytes) -> None:
        if self.state == state.AWAITING_SETUP:
            request = SetupConnectionRequest()
            request.merge(payload)
            self._receive_setup(request, payload)
            return
        message = GuestMessage()
        message.merge(payload)
        if self.state == state.RUNNING:
            self._receive_message(message)
        elif message.member == messages.PROOF and self.state == state.AWAITING_PROOF:
            assert isinstance(message.value, bytes)
            self._receive_proof(message.value)
        elif message.member == messages.REQUEST_CHUNK and self.state == state.DEFERRED:
            assert isinstance(message.value, bytes)
            self._receive_chunk(message.value)
        elif self._is_deferred and message.member not in (messages.ALIVE, messages.HOLD):
            raise RemoteProtocolError("a message before the session started")

    def _receive_setup(self, request: SetupConnectionRequest, payload: bytes) -> None:
        offer = request.extended
        if self.limits is not None and offer is not None and offer.version > 0:
            self._extend(offer)
            if self.proof is not None:
                self._challenge(offer, payload)
                return
            if offer.request_size:
                self._defer(offer.request_size)
                return
        elif self.proof is not None and not self._allow_legacy_clients:
            self._distrust("this machine demands its token, which ChromeOS's protocol cannot prove")
            return
        self._step(state.REQUEST)
        self._events.append(RequestReceived(request))

    def _challenge(self, offer: Extended, payload: bytes) -> None:
        """Proves the token, and waits for the client's proof; what it wants it will say behind that."""
        proof = self.proof
        assert proof is not None
        if not offer.nonce:
            self._distrust("this machine demands its token, and the client has none")
        elif len(offer.nonce) != len(proof.nonce) or not offer.request_size:
            raise RemoteProtocolError("an offer with a bad nonce, or without a deferred request")
        elif self._is_small_enough(offer.request_size):
            response = SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, extended=self._answer(None))
            answer = response.encode()
            proof.bind(payload)
            proof.bind(answer)
            self._step(state.CHALLENGE)
            self._is_deferred = True
            self._send_response(answer)
            self._send(messages.PROOF, proof.make())

    def _receive_proof(self, claim: bytes) -> None:
        assert self.proof is not None
        if not self.proof.is_peers(claim):
            self._distrust("the client's proof of the token is wrong")
            return
        self._step(state.GO_ON)
        self._admit_large_frames()

    def _distrust(self, reason: str) -> None:
        self.refuse(reason, Failure(messages.NOT_TRUSTED, subject=b"token"))
        self._events.append(Distrusted(reason))

    def _is_small_enough(self, request_size: int) -> bool:
        """Whether a request of this size will be taken; it is refused here when not."""
        self._request_size = request_size
        if request_size > REQUEST_MAX:
            self.refuse(
                f"a request of {request_size} bytes is over the limit of {REQUEST_MAX}",
                Failure(messages.TOO_LONG, subject=b"request"),
            )
            self._events.append(Failed("the request is too long", None))
            return False
        return True

    def _defer(self, request_size: int) -> None:
        if not self._is_small_enough(request_size):
            return
        self._step(state.GO_ON)
        self._is_deferred = True
        response = SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, extended=self._answer(None))
        self._send_response(response.encode())

    def _receive_chunk(self, chunk: bytes) -> None:
        if len(self._chunks) + len(chunk) > self._request_size:
            raise RemoteProtocolError("more of the request than announced")
        self._chunks += chunk
        if len(self._chunks) < self._request_size:
            return
        request = SetupConnectionRequest()
        request.merge(bytes(self._chunks))
        self._chunks = bytearray()
        request.extended = None
        self._step(state.REQUEST)
        self._events.append(RequestReceived(request))

    def _receive_message(self, message: GuestMessage) -> None:
        value = message.value
        if message.member == messages.STATUS_MESSAGE:
            assert isinstance(value, ConnectionStatusMessage)
            if value.status != messages.READY:
                self._step(state.END)
                self._events.append(Failed(f"vshd connection has exited abnormally: {value.status}", None))
        elif message.member == messages.RESIZE_MESSAGE:
            assert isinstance(value, WindowResizeMessage)
            self._events.append(Resized(value.rows, value.cols, value.xpixels, value.ypixels))
        elif message.member == messages.SIGNAL:
            if value in messages.LEGACY_SIGNALS:
                assert isinstance(value, int)
                self._events.append(Signalled(value))
        elif message.member == messages.SIGNAL_NUMBER and self.is_extended:
            assert isinstance(value, int)
            if not 0 < value <= messages.SIGNAL_MAX:
                raise RemoteProtocolError(f"signal {value} does not exist")
            self._events.append(Signalled(value))
        elif message.member == messages.HOLD and self.is_extended:
            self._events.append(Held())
        elif message.member == messages.REQUEST_CHUNK and self.is_extended:
            raise RemoteProtocolError("a part of a request after the session started")
        elif message.member == messages.PROOF and self.is_extended:
            raise RemoteProtocolError("a proof at the wrong time")
        else:
            self._receive_common(message)

    def _incoming_stream(self, number: int) -> int | None:
        # Upstream's server takes data of any stream for stdin.
        if number != messages.STDIN and self.is_extended:
            raise RemoteProtocolError(f"data on stream {number}, which goes the other way")
        return messages.STDIN


def _quote(description: str) -> bytes:
    return description.encode("utf-8", "surrogateescape")[:DESCRIPTION_MAX]
