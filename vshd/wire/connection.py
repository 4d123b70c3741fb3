"""A connection without a socket: bytes in, events out, frames to send in `output`.

Owns what both sides share: framing, streams, credit, and the switch to extended mode. vshd.wire.client and
vshd.wire.server add the handshake and the order of messages. Nothing here reads a clock: silence is
vshd.wire.silence's, driven by code that has one.
"""

from vshd.wire import messages, state
from vshd.wire.errors import LocalProtocolError, RemoteProtocolError
from vshd.wire.events import Broken, Data, EndOfStream, Event, StreamClosed
from vshd.wire.frames import (
    FRAME_MARGIN,
    LEGACY_MAX_DATA,
    LEGACY_MAX_PAYLOAD,
    DataPiece,
    FrameReader,
    encode_data_head,
    encode_frame,
)
from vshd.wire.messages import CreditMessage, DataMessage, Extended
from vshd.wire.output import Output
from vshd.wire.proto3 import Message, Oneof
from vshd.wire.streams import ReceiveStream, SendStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    # Only who has a token needs it, and brings it along.
    from vshd.wire.proof import Proof

VERSION = 1
# What announcements are clamped to (2.1).
MAX_DATA_RANGE = (LEGACY_MAX_DATA, 1 << 20)
WINDOW_RANGE = (LEGACY_MAX_DATA, 1 << 24)
# 256 KiB: at this size the cost of a frame vanishes beside the copies; more only adds latency.
MAX_DATA = 1 << 18
# Four frames in flight per stream keep a pipeline full; times three it bounds a session's memory.
WINDOW = 1 << 20
# Long enough for a guest under emulation on a busy machine, short enough for a person who waits.
SILENCE_MS = 120_000
# What the field holds: 49 days.
SILENCE_MS_MAX = (1 << 32) - 1
REQUEST_MAX = 8 << 20


# States in which bytes are not looked at: the connection is over, or a request waits for its answer.
_DEAF = (state.OVER, state.BROKEN, state.PREPARING, state.RAW)


def default_limits() -> Extended:
    """What we announce unless told otherwise."""
    return Extended(version=VERSION, max_data=MAX_DATA, window=WINDOW, silence_ms=SILENCE_MS)


def clamp(value: int, limits: tuple[int, int]) -> int:
    return max(limits[0], min(value, limits[1]))


class Connection:
    """One side of a session. Invariant: `output` holds whole frames only, in the order they must leave."""

    SEND_STREAMS: tuple[int, ...] = ()
    RECEIVE_STREAMS: tuple[int, ...] = ()
    STATES: dict[tuple[str, str], str]
    OUTGOING: type[Oneof]
    INCOMING: type[Oneof]

    def __init__(self, first_state: str, limits: Extended | None, proof: "Proof | None" = None) -> None:
        """limits: what we announce; None keeps to legacy mode whatever the peer offers. proof: demanded, and given."""
        self.state = first_state
        self.output = Output()
        self.limits = limits
        self.peer: Extended | None = None
        self.proof = proof
        self.max_data = LEGACY_MAX_DATA
        self.max_payload = LEGACY_MAX_PAYLOAD
        self.sending = {stream: SendStream() for stream in self.SEND_STREAMS}
        self.receiving = {stream: ReceiveStream() for stream in self.RECEIVE_STREAMS}
        self._reader = FrameReader(LEGACY_MAX_PAYLOAD)
        self._events: list[Event] = []
        # What a hasty client sent before its request was answered.
        self._early = b""

    @property
    def is_extended(self) -> bool:
        return self.peer is not None

    @property
    def is_finished(self) -> bool:
        """Nothing will be received any more."""
        return self.state in (state.OVER, state.BROKEN)

    # What the driver has received.

    def receive_data(self, data: memoryview | bytes) -> list[Event]:
        """The events in `data`. What the peer does wrong is a last event Broken; bytes after the end are ignored.

        A server that has accepted a request calls this once more with b"", for what came behind the request.
        """
        if self._early:
            data = self._early + bytes(data)
            self._early = b""
        view = memoryview(data)
        position = 0
        events: list[Event] = []
        self._events = events
        try:
            while position < len(view) and self.state not in _DEAF:
                position, piece = self._reader.receive(view, position)
                if piece is None:
                    break
                if isinstance(piece, DataPiece):
                    self._receive_piece(piece)
                else:
                    self._receive_payload(piece)
        except RemoteProtocolError as error:
            self._break(str(error), is_end=False)
        if self.state in (state.PREPARING, state.RAW):
            self._early = bytes(view[position:])
        return events

    def take_rest(self) -> bytes:
        """What was received behind the handshake of a forward; the driver has the connection from here on."""
        rest, self._early = self._early, b""
        return rest

    def bulk_room(self, stream: int) -> int:
        """Bytes of a large frame of `stream` that come next, and that the driver may take from the transport without
        showing them here: it says took() instead. 0 when all must come through receive_data().
        """
        receiver = self.receiving[stream]
        if self.state != state.RUNNING or receiver.is_ended or receiver.is_closed:
            return 0
        return min(self._reader.bulk_left(stream), receiver.allowance or 0)

    def took(self, stream: int, size: int) -> None:
        """The driver took `size` bytes of that; they are consumed like those of a Data event."""
        self.receiving[stream].take(size)
        self._reader.skip(size)

    @property
    def bulk_head_size(self) -> int:
        """What to receive at most, so that little but the head comes of a large frame; 0: no matter."""
        return self._reader.bulk_head_size if self.state == state.RUNNING else 0

    def receive_end(self) -> list[Event]:
        """The transport ended."""
        self._events = []
        if not self.is_finished:
            where = "" if self._reader.is_between_frames else " inside a message"
            self._break(f"the connection ended{where}", is_end=True)
        return self._events

    # What the driver wants to say.

    def send_room(self, stream: int) -> int:
        """How many bytes of `stream` may be sent now."""
        return self.sending[stream].room if self.state == state.RUNNING else 0

    def send_data(self, stream: int, data: memoryview | bytes) -> None:
        """Sends data in frames of at most max_data bytes; it must not change until `output` has given it away."""
        size = len(data)
        sender = self.sending[stream]
        if size > self.send_room(stream):
            raise LocalProtocolError(f"no room for {size} bytes of {messages.STREAM_NAMES[stream]}")
        if sender.credit is not None:
            sender.credit -= size
        if size <= self.max_data:
            if size:
                self.output.append(encode_data_head(stream, size))
                self.output.append(data)
            return
        view = memoryview(data)
        for start in range(0, size, self.max_data):
            chunk = view[start : start + self.max_data]
            self.output.append(encode_data_head(stream, len(chunk)))
            self.output.append(chunk)

    def begin_data(self, stream: int, size: int) -> bytes:
        """The head of a frame whose `size` bytes of data the driver has itself (at most max_data): it appends both to
        `output`, at once, as what waits elsewhere."""
        sender = self.sending[stream]
        if size > min(self.send_room(stream), self.max_data):
            raise LocalProtocolError(f"no room for {size} bytes of {messages.STREAM_NAMES[stream]}")
        if sender.credit is not None:
            sender.credit -= size
        return encode_data_head(stream, size)

    def send_end(self, stream: int) -> None:
        """Ends a stream of ours; once, later calls do nothing."""
        sender = self.sending[stream]
        if self.state == state.RUNNING and not sender.is_ended and not sender.is_closed:
            sender.is_ended = True
            self._send(messages.DATA_MESSAGE, DataMessage(stream))

    def close_stream(self, stream: int) -> None:
        """We read `stream` no more: the peer is told (extended mode), and what it still sends is dropped."""
        receiver = self.receiving[stream]
        if receiver.is_closed or receiver.is_ended:
            return
        receiver.is_closed = True
        if self.is_extended and self.state == state.RUNNING:
            self._send(messages.CLOSE_STREAM, stream)

    def consumed(self, stream: int, size: int) -> None:
        """`size` bytes of a Data event have reached their end; returns credit when it is worth it."""
        credit = self.receiving[stream].give_back(size)
        if credit and self.state == state.RUNNING:
            self._send(messages.CREDIT, CreditMessage(stream, credit))

    def send_alive(self) -> None:
        """A word against silence; extended mode only."""
        if self.is_extended and not self.is_finished:
            self._send(messages.ALIVE, True)

    # Shared by the two sides.

    def _step(self, step: str) -> None:
        self.state = state.next_state(self.STATES, self.state, step)
        # Only now can a payload be bulk data; before, it is the setup.
        self._reader.splits_data = self.state == state.RUNNING

    def _break(self, reason: str, *, is_end: bool) -> None:
        self.state = state.BROKEN
        self._events.append(Broken(reason, is_end))

    def _send(self, member: int, value: Message | int | bytes) -> None:
        self._send_payload(self.OUTGOING(member, value).encode())

    def _send_payload(self, payload: bytes) -> None:
        self.output.append(encode_frame(payload, self.max_payload))

    def _extend(self, peer: Extended) -> None:
        """Extended mode from here on: the peer's limits hold for what we send, ours for what it sends."""
        assert self.limits is not None
        self.peer = peer
        self.max_data = clamp(peer.max_data, MAX_DATA_RANGE)
        self.max_payload = self.max_data + FRAME_MARGIN
        if self.proof is None:
            self._admit_large_frames()
        for sender in self.sending.values():
            sender.credit = clamp(peer.window, WINDOW_RANGE)
        for receiver in self.receiving.values():
            receiver.open_window(clamp(self.limits.window, WINDOW_RANGE))

    def _admit_large_frames(self) -> None:
        """Takes payloads as large as we announced; of a peer that has to prove itself first, only then."""
        assert self.limits is not None
        self._reader.max_payload = clamp(self.limits.max_data, MAX_DATA_RANGE) + FRAME_MARGIN

    def _receive_piece(self, piece: DataPiece) -> None:
        stream = self._incoming_stream(piece.stream)
        if stream is None:
            return
        receiver = self.receiving[stream]
        receiver.take(len(piece.data))
        if receiver.is_ended and self.is_extended:
            raise RemoteProtocolError(f"data after the end of {messages.STREAM_NAMES[stream]}")
        if not receiver.is_ended and not receiver.is_closed:
            self._events.append(Data(stream, piece.data))

    def _receive_stream_end(self, number: int) -> None:
        stream = self._incoming_stream(number)
        if stream is None:
            return
        receiver = self.receiving[stream]
        if receiver.is_ended and self.is_extended:
            raise RemoteProtocolError(f"a second end of {messages.STREAM_NAMES[stream]}")
        if not receiver.is_ended:
            receiver.is_ended = True
            self._events.append(EndOfStream(stream))

    def _receive_payload(self, payload: bytes) -> None:
        """A payload that is not plain bulk data."""
        raise NotImplementedError

    def _incoming_stream(self, number: int) -> int | None:
        """The stream that data of `number` belongs to; None: drop it."""
        raise NotImplementedError

    def _receive_common(self, message: Oneof) -> None:
        """The members that both sides may send while RUNNING; unknown ones are skipped."""
        value = message.value
        if message.member == messages.DATA_MESSAGE:
            assert isinstance(value, DataMessage)
            if value.data:
                self._receive_piece(DataPiece(value.stream, memoryview(value.data)))
            else:
                self._receive_stream_end(value.stream)
        elif not self.is_extended:
            return
        elif message.member == messages.CREDIT:
            assert isinstance(value, CreditMessage)
            self._sender(value.stream).add_credit(value.bytes)
        elif message.member == messages.CLOSE_STREAM:
            assert isinstance(value, int)
            self._sender(value).is_closed = True
            self._events.append(StreamClosed(value))

    def _sender(self, stream: int) -> SendStream:
        sender = self.sending.get(stream)
        if sender is None:
            raise RemoteProtocolError(f"a word about stream {stream}, which goes the other way")
        return sender
