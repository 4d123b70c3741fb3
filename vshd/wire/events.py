"""What a connection tells its driver: plain objects, one class per thing that can happen."""

from vshd.wire.messages import Failure, SetupConnectionRequest


class Event:
    """Anything a connection reports."""

    __slots__ = ()


class RequestReceived(Event):
    """Server: the whole request is here; answer with accept() or refuse()."""

    __slots__ = ("request",)

    def __init__(self, request: SetupConnectionRequest) -> None:
        self.request = request


class Established(Event):
    """Client: the target runs. pid is the guest's."""

    __slots__ = ("is_extended", "pid")

    def __init__(self, pid: int, is_extended: bool) -> None:
        self.pid = pid
        self.is_extended = is_extended


class HandedOver(Event):
    """Client: the service stands; the connection's bytes from here on are in take_rest() and behind it.

    `description`: of a forward, where the server listens, empty when it has connected; of a thaw, the wall's layers.
    """

    __slots__ = ("description",)

    def __init__(self, description: str) -> None:
        self.description = description


class Refused(Event):
    """Client: nothing was run.

    `failure` is None with a legacy server; `is_too_long` then says that the request had to be deferred.
    """

    __slots__ = ("description", "failure", "is_too_long")

    def __init__(self, description: str, failure: Failure | None, is_too_long: bool = False) -> None:
        self.description = description
        self.failure = failure
        self.is_too_long = is_too_long


class Distrusted(Event):
    """The peer did not prove the machine's token, and the connection is over.

    Client: nothing but the stub was sent; `said` are the server's own words, if it had any. Server: the client has been
    refused, and that may still have to leave.
    """

    __slots__ = ("reason", "said")

    def __init__(self, reason: str, said: str = "") -> None:
        self.reason = reason
        self.said = said


class Data(Event):
    """Bytes of a stream; call consumed() when they are gone.

    Valid until the buffer given to receive_data() is used again.
    """

    __slots__ = ("data", "stream")

    def __init__(self, stream: int, data: memoryview) -> None:
        self.stream = stream
        self.data = data


class EndOfStream(Event):
    """The peer finished this stream."""

    __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class StreamClosed(Event):
    """The peer reads this stream of ours no more."""

    __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class Resized(Event):
    """Server: the client's terminal has this size now."""

    __slots__ = ("cols", "rows", "xpixels", "ypixels")

    def __init__(self, rows: int, cols: int, xpixels: int = 0, ypixels: int = 0) -> None:
        self.rows = rows
        self.cols = cols
        self.xpixels = xpixels
        self.ypixels = ypixels


class Signalled(Event):
    """Server: the client sends the target this signal."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Held(Event):
    """Server: the client is about to be stopped; its silence does not count until it speaks again."""

    __slots__ = ()


class Positioned(Event):
    """Client: the next byte of a lasting session's output has this offset; `dropped` bytes before it are lost.

    Always the first event of such a session. has_pty: the target has a terminal.
    """

    __slots__ = ("dropped", "has_pty", "offset")

    def __init__(self, offset: int, dropped: int, has_pty: bool) -> None:
        self.offset = offset
        self.dropped = dropped
        self.has_pty = has_pty


class Exited(Event):
    """Client: the target ended, with a code, or with a signal (0: none) that only extended mode tells apart."""

    __slots__ = ("code", "core_dumped", "signal")

    def __init__(self, code: int, signal: int, core_dumped: bool) -> None:
        self.code = code
        self.signal = signal
        self.core_dumped = core_dumped


class Failed(Event):
    """The peer ended the session for a reason of its own."""

    __slots__ = ("description", "failure")

    def __init__(self, description: str, failure: Failure | None) -> None:
        self.description = description
        self.failure = failure


class Broken(Event):
    """The connection cannot go on: it ended early, or the peer broke the protocol. Always the last event."""

    __slots__ = ("is_end", "reason")

    def __init__(self, reason: str, is_end: bool) -> None:
        self.reason = reason
        self.is_end = is_end
