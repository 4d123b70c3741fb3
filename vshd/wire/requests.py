"""What a client may ask for instead of a command: the messages of docs/reference/protocol.md sections 3 to 8 that stand
in a SetupConnectionRequest.

Owns names and field numbers, as vshd.wire.messages does.
"""

from vshd.wire.proto3 import BOOL, BYTES, INT32, UINT32, UINT64, Field, Message


class Forward(Message):
    """Asks for a forward instead of a command (3): where to connect to, or where to listen and whom to bring it,
    or where each branch connects to."""

    __slots__ = ("back", "branches", "connect", "listen", "token", "user")

    FIELDS = (
        Field(1, "connect", BYTES),
        Field(2, "listen", BYTES),
        Field(3, "back", BYTES),
        Field(4, "token", BYTES),
        Field(5, "user", BYTES),
        Field(6, "branches", BYTES),
    )

    def __init__(
        self,
        *,
        connect: bytes = b"",
        listen: bytes = b"",
        back: bytes = b"",
        token: bytes = b"",
        user: bytes = b"",
        branches: bytes = b"",
    ) -> None:
        self.connect = connect
        self.listen = listen
        self.back = back
        self.token = token
        self.user = user
        self.branches = branches


class Ports(Message):
    """Asks for reports of the ports that the guest listens on (3.6)."""

    __slots__ = ("user",)

    FIELDS = (Field(1, "user", BYTES),)

    def __init__(self, *, user: bytes = b"") -> None:
        self.user = user


class Freeze(Message):
    """Asks for the guest to be made fit for a snapshot instead of a command (4): it serves nothing until it is thawed.

    secret: what the one who thaws it must prove.
    """

    __slots__ = ("secret",)

    FIELDS = (Field(1, "secret", BYTES),)

    def __init__(self, *, secret: bytes = b"") -> None:
        self.secret = secret


class Thaw(Message):
    """Makes a machine of its own of a restored guest (4). What is empty stays as it is; token: empty for none."""

    __slots__ = ("boot_id", "entropy", "hostname", "machine_id", "token")

    FIELDS = (
        Field(1, "hostname", BYTES),
        Field(2, "entropy", BYTES),
        Field(3, "machine_id", BYTES),
        Field(4, "boot_id", BYTES),
        Field(5, "token", BYTES),
    )

    def __init__(
        self,
        *,
        hostname: bytes = b"",
        entropy: bytes = b"",
        machine_id: bytes = b"",
        boot_id: bytes = b"",
        token: bytes = b"",
    ) -> None:
        self.hostname = hostname
        self.entropy = entropy
        self.machine_id = machine_id
        self.boot_id = boot_id
        self.token = token


class Clock(Message):
    """Opens a connection over which the host sets the guest's clock (5.4)."""

    __slots__ = ()


class PowerOff(Message):
    """Asks the server to end its guest (5.5)."""

    __slots__ = ()


class Logs(Message):
    """Asks for the records of the guest's log (8).

    collector, next: the id of the collector that the client knows, and the number of the record that it lacks. A client
    that knows none, or another one, gets all that is kept.
    """

    __slots__ = ("collector", "next")

    FIELDS = (Field(1, "collector", BYTES), Field(2, "next", UINT64))

    def __init__(self, *, collector: bytes = b"", next_: int = 0) -> None:
        self.collector = collector
        self.next = next_


class Cores(Message):
    """Asks for the core dumps of the guest's programs (5.7). size: of a core without its zeros, at most."""

    __slots__ = ("size",)

    FIELDS = (Field(1, "size", UINT64),)

    def __init__(self, *, size: int = 0) -> None:
        self.size = size


class Units(Message):
    """Asks for the failures of the guest's services (5.8)."""

    __slots__ = ()


class Subsystem(Message):
    """Asks for a subsystem instead of a command (6), by its name, such as sftp."""

    __slots__ = ("name", "user")

    FIELDS = (Field(1, "name", BYTES), Field(2, "user", BYTES))

    def __init__(self, *, name: bytes = b"", user: bytes = b"") -> None:
        self.name = name
        self.user = user


class Share(Message):
    """Mounts a folder of the host, which answers the requests of the guest's kernel over this connection (5.7).

    path: where, in the guest. source: what the guest's list of mounts calls it. by: the way of its requests, a name of
    vshd.services.share.WAYS; FUSE where it is empty.
    """

    __slots__ = ("by", "path", "read_only", "source")

    FIELDS = (Field(1, "path", BYTES), Field(2, "source", BYTES), Field(3, "read_only", BOOL), Field(4, "by", BYTES))

    def __init__(self, *, path: bytes = b"", source: bytes = b"", read_only: bool = False, by: bytes = b"") -> None:
        self.path = path
        self.source = source
        self.read_only = read_only
        self.by = by


class Lasting(Message):
    """Starts a session that outlives its client, or lists, signals or forgets such sessions (7.1).

    session: an id or a name. command: of START, an encoded SetupConnectionRequest. name: for the new session. size: how
    many bytes of output are kept, 0 for the server's choice. file: where, empty for memory.
    """

    __slots__ = ("command", "file", "name", "session", "signal", "size", "user", "verb")

    FIELDS = (
        Field(1, "verb", INT32),
        Field(2, "session", BYTES),
        Field(3, "user", BYTES),
        Field(4, "command", BYTES),
        Field(5, "name", BYTES),
        Field(6, "size", UINT64),
        Field(7, "file", BYTES),
        Field(8, "signal", UINT32),
    )

    def __init__(
        self,
        *,
        verb: int = 0,
        session: bytes = b"",
        user: bytes = b"",
        command: bytes = b"",
        name: bytes = b"",
        size: int = 0,
        file: bytes = b"",
        signal: int = 0,
    ) -> None:
        self.verb = verb
        self.session = session
        self.user = user
        self.command = command
        self.name = name
        self.size = size
        self.file = file
        self.signal = signal


class Attach(Message):
    """Makes the connection one to a session that lasts (7.2).

    since: the offset where its output begins. tail: not 0: at most so many bytes of the past instead. closes: the end
    of this client's stdin ends the target's. rows, cols: of the client's terminal, 0 without one.
    """

    __slots__ = ("closes", "cols", "mode", "rows", "session", "since", "steal", "tail", "user")

    FIELDS = (
        Field(1, "session", BYTES),
        Field(2, "user", BYTES),
        Field(3, "mode", INT32),
        Field(4, "since", UINT64),
        Field(5, "tail", UINT32),
        Field(6, "steal", BOOL),
        Field(7, "closes", BOOL),
        Field(8, "rows", INT32),
        Field(9, "cols", INT32),
    )

    def __init__(
        self,
        *,
        session: bytes = b"",
        user: bytes = b"",
        mode: int = 0,
        since: int = 0,
        tail: int = 0,
        steal: bool = False,
        closes: bool = False,
        rows: int = 0,
        cols: int = 0,
    ) -> None:
        self.session = session
        self.user = user
        self.mode = mode
        self.since = since
        self.tail = tail
        self.steal = steal
        self.closes = closes
        self.rows = rows
        self.cols = cols
