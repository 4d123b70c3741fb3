"""The server's side of a connection: takes the setup, answers it, reports what the client wants of the target."""

from vshd.wire import messages, state
from vshd.wire.connection import REQUEST_MAX, VERSION, Connection
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.events import Failed, Held, RequestReceived, Resized, Signalled
from vshd.wire.messages import (
    ConnectionStatusMessage,
    Extended,
    Failure,
    GuestMessage,
    HostMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
    WindowResizeMessage,
)


class ServerConnection(Connection):
    """Invariant: `_chunks` is the part of a deferred request that has come, never longer than announced."""

    SEND_STREAMS = (messages.STDOUT, messages.STDERR)
    RECEIVE_STREAMS = (messages.STDIN,)
    STATES = state.SERVER
    OUTGOING = HostMessage
    INCOMING = GuestMessage

    def __init__(self, limits: Extended | None) -> None:
        super().__init__(state.AWAITING_SETUP, limits)
        self._chunks = bytearray()
        self._request_size = 0
        self._is_deferred = False

    def accept(self, pid: int) -> None:
        """The target runs."""
        self._step(state.ACCEPT)
        self._respond(SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, pid))

    def refuse(self, description: str, failure: Failure) -> None:
        """Nothing was run, and the session ends."""
        self._step(state.REFUSE)
        response = SetupConnectionResponse(messages.FAILED, description.encode("utf-8", "surrogateescape"))
        self._respond(response, failure)

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
        text = description.encode("utf-8", "surrogateescape")
        if self.state in (state.AWAITING_SETUP, state.PREPARING):
            self.refuse(description, failure)
        elif self.state in (state.RUNNING, state.DEFERRED, state.BROKEN):
            status = ConnectionStatusMessage(messages.FAILED, text)
            if self.is_extended:
                status.failure = failure
            self._send(messages.STATUS_MESSAGE, status)
            self.state = state.OVER

    def _respond(self, response: SetupConnectionResponse, failure: Failure | None = None) -> None:
        if self.is_extended:
            response.extended = self._answer(failure)
        if self._is_deferred:
            if failure is None:
                response.extended = None
            self._send(messages.STARTED, response)
        else:
            self._send_payload(response.encode())

    def _answer(self, failure: Failure | None) -> Extended:
        limits = self.limits
        assert limits is not None and self.peer is not None
        return Extended(
            version=min(VERSION, self.peer.version),
            features=limits.features & self.peer.features,
            max_data=limits.max_data,
            window=limits.window,
            silence_ms=limits.silence_ms,
            failure=failure,
        )

    def _receive_payload(self, payload: bytes) -> None:
        if self.state == state.AWAITING_SETUP:
            request = SetupConnectionRequest()
            request.merge(payload)
            self._receive_setup(request)
            return
        message = GuestMessage()
        message.merge(payload)
        if self.state == state.RUNNING:
            self._receive_message(message)
        elif message.member == messages.REQUEST_CHUNK and self.state == state.DEFERRED:
            assert isinstance(message.value, bytes)
            self._receive_chunk(message.value)
        elif self._is_deferred and message.member not in (messages.ALIVE, messages.HOLD):
            raise RemoteProtocolError("a message before the session started")

    def _receive_setup(self, request: SetupConnectionRequest) -> None:
        offer = request.extended
        if self.limits is not None and offer is not None and offer.version > 0:
            self._extend(offer)
            if offer.request_size:
                self._defer(offer.request_size)
                return
        self._step(state.REQUEST)
        self._events.append(RequestReceived(request))

    def _defer(self, request_size: int) -> None:
        if request_size > REQUEST_MAX:
            self.refuse(
                f"a request of {request_size} bytes is over the limit of {REQUEST_MAX}",
                Failure(messages.TOO_LONG, subject=b"request"),
            )
            self._events.append(Failed("the request is too long", None))
            return
        self._request_size = request_size
        self._step(state.GO_ON)
        self._is_deferred = True
        response = SetupConnectionResponse(messages.READY, messages.READY_DESCRIPTION, extended=self._answer(None))
        self._send_payload(response.encode())

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
            self._events.append(Resized(value.rows, value.cols))
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
        else:
            self._receive_common(message)

    def _incoming_stream(self, number: int) -> int | None:
        # Upstream's server takes data of any stream for stdin.
        if number != messages.STDIN and self.is_extended:
            raise RemoteProtocolError(f"data on stream {number}, which goes the other way")
        return messages.STDIN
