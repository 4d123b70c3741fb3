"""What -L, -R, -D and --proxy say, as values: where a forward listens, and where what it accepts goes.

ssh's syntax, and places with their kind before them. Pure; knows nothing of sockets.

    -L [ADDRESS:]PORT:PORT            a TCP port here          -> a vsock port of the guest
    -L [ADDRESS:]PORT:HOST:PORT       a TCP port here          -> a TCP port, as the guest reaches it
    -L [ADDRESS:]PORT:/PATH           a TCP port here          -> a UNIX socket of the guest
    -L /PATH:...                      a UNIX socket here       -> any of these
    -R [ADDRESS:]PORT:[HOST:]PORT     a TCP port of the guest  -> a TCP port, as this host reaches it
    -R vsock:PORT:[HOST:]PORT         this host's vsock port   -> the same (the guest connects to CID 2)
    -D [ADDRESS:]PORT                 a TCP port here          -> what each client asks for, by SOCKS 5
    -D /PATH                          a UNIX socket here       -> the same

A side may also be written `tcp:HOST:PORT`, `unix:PATH`, or (the guest's; listening: the host's) `vsock:PORT`. IPv6
addresses stand in brackets; `*` or nothing as the listening address is every one of IPv4, and without one it is
loopback: 127.0.0.1 here, localhost (127.0.0.1 and ::1) in the guest.
"""

from vsh.errors import VshError

USAGE_STATUS = 64
LOOPBACK = "127.0.0.1"
LOCALHOST = "localhost"
TCP_PORT_MAX = 0xFFFF
VSOCK_PORT_MAX = (1 << 32) - 2

LOCAL, REMOTE, DYNAMIC = "L", "R", "D"
# The target of -D: each client names its own.
SOCKS = "SOCKS5"
# The ports that the guest listens on, whatever they are (vsh.forward.automatic).
AUTOMATIC = "A"
# Every address of a prefix (vshd.carry.mapping) is listened at, and each connection goes to the CID and port it names.
MAPPED = "M"


class ForwardSpec:
    """One forward. kind LOCAL: `listen` is a place here and `target` one of the guest; REMOTE: the other way around;
    DYNAMIC: `target` is SOCKS; MAPPED: `target` is the prefix.

    Places are `tcp:HOST:PORT`, `unix:PATH` or `vsock:PORT`.
    """

    __slots__ = ("kind", "listen", "target")

    def __init__(self, kind: str, listen: str, target: str) -> None:
        self.kind = kind
        self.listen = listen
        self.target = target

    def __str__(self) -> str:
        if self.kind == MAPPED:
            return self.target
        if self.kind == DYNAMIC:
            return f"-D {self.listen}"
        return f"-{self.kind} {self.listen}:{self.target}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForwardSpec) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def parse_forward(kind: str, text: str) -> ForwardSpec:
    """The forward in the value of -L, -R or -D. Raises VshError."""
    if kind == DYNAMIC:
        return ForwardSpec(DYNAMIC, _parse_dynamic(text), SOCKS)
    fields = _split(text)
    listen = _take_place(fields, text)
    if not listen:
        listen = _take_plain_listen(kind, fields, text)
    target = _take_place(fields, text) or _take_plain_target(kind, fields, text)
    if fields:
        raise _wrong(text, f"what is ':{':'.join(fields)}' at its end?")
    if kind == LOCAL and listen.startswith("vsock:"):
        raise _wrong(text, "this host cannot listen on vsock for itself; -R vsock:PORT:... listens for the guest")
    if kind == REMOTE and target.startswith("vsock:"):
        raise _wrong(text, "a vsock port of this host is no target; TCP ports and UNIX sockets are")
    if _is_name_of_every_port(target):
        raise _wrong(text, "port 0 is for listening")
    return ForwardSpec(kind, listen, target)


def render_listening(forward: ForwardSpec, place: str) -> str:
    """Which side listens, and where."""
    if forward.kind != REMOTE:
        return f"listening at {place}"
    return f"{'this host' if forward.listen.startswith('vsock:') else 'the guest'} listens at {place}"


def parse_target(text: str) -> str:
    """The guest's place in the value of --proxy: a vsock port, HOST:PORT, a path, or one with its kind."""
    fields = _split(text)
    target = _take_place(fields, text) or _take_plain_target(LOCAL, fields, text)
    if fields or _is_name_of_every_port(target):
        raise _wrong(text, "a place of the guest is PORT, HOST:PORT, /PATH, vsock:PORT, tcp:HOST:PORT or unix:PATH")
    return target


def _parse_dynamic(text: str) -> str:
    """Where -D listens: [ADDRESS:]PORT, or a place with its kind."""
    fields = _split(text)
    listen = _take_place(fields, text)
    if not listen:
        address = LOOPBACK if len(fields) == 1 else fields.pop(0) or "*"
        listen = f"tcp:{address}:{_parse_port(fields.pop(0), TCP_PORT_MAX, text)}"
    if fields or listen.startswith("vsock:"):
        raise _wrong(text, "-D takes [ADDRESS:]PORT or /PATH")
    return listen


def _split(text: str) -> list[str]:
    """Fields between colons; brackets hold an IPv6 address together."""
    fields, field, depth = [], "", 0
    for letter in text:
        if letter == ":" and not depth:
            fields.append(field)
            field = ""
            continue
        depth += {"[": 1, "]": -1}.get(letter, 0)
        field += letter
    if depth:
        raise _wrong(text, "a bracket is open")
    return [*fields, field]


def _take_place(fields: list[str], text: str) -> str:
    """A place with its kind before it, or a path, taken off the front of the fields; empty when there is none."""
    if not fields:
        return ""
    if fields[0].startswith("/"):
        return f"unix:{fields.pop(0)}"
    if fields[0] == "unix" and len(fields) > 1 and fields[1]:
        del fields[0]
        return f"unix:{fields.pop(0)}"
    if fields[0] == "vsock" and len(fields) > 1:
        del fields[0]
        return f"vsock:{_parse_port(fields.pop(0), VSOCK_PORT_MAX, text)}"
    if fields[0] == "tcp" and len(fields) > 2 and fields[1]:
        del fields[0]
        return f"tcp:{fields.pop(0)}:{_parse_port(fields.pop(0), TCP_PORT_MAX, text)}"
    return ""


def _take_plain_listen(kind: str, fields: list[str], text: str) -> str:
    """[ADDRESS:]PORT, ssh's way: a first field of digits is the port. Of the guest, localhost is 127.0.0.1 and ::1."""
    if len(fields) < 2:
        raise _wrong(text, "it needs a place to listen at and one to connect to")
    default = LOCALHOST if kind == REMOTE else LOOPBACK
    address = default if fields[0].isdigit() else fields.pop(0) or "*"
    return f"tcp:{address}:{_parse_port(fields.pop(0), TCP_PORT_MAX, text)}"


def _take_plain_target(kind: str, fields: list[str], text: str) -> str:
    """[HOST:]PORT: a port alone is the guest's vsock port, or this host's own TCP port."""
    if not fields:
        raise _wrong(text, "it has no place to connect to")
    if len(fields) == 1:
        if kind == LOCAL:
            return f"vsock:{_parse_port(fields.pop(0), VSOCK_PORT_MAX, text)}"
        return f"tcp:{LOOPBACK}:{_parse_port(fields.pop(0), TCP_PORT_MAX, text)}"
    host = fields.pop(0)
    if not host:
        raise _wrong(text, "the host to connect to is empty")
    return f"tcp:{host}:{_parse_port(fields.pop(0), TCP_PORT_MAX, text)}"


def _parse_port(word: str, maximum: int, text: str) -> int:
    if word.isascii() and word.isdigit() and len(word) <= 10 and int(word) <= maximum:
        return int(word)
    raise _wrong(text, f"'{word}' is no port (0 to {maximum})")


def _is_name_of_every_port(target: str) -> bool:
    return target.startswith(("tcp:", "vsock:")) and target.endswith(":0")


def _wrong(text: str, why: str) -> VshError:
    return VshError(
        f"bad forward '{text}': {why}",
        hint="-L 8080:80 (the guest's vsock port 80), -L 8080:localhost:80 (its TCP port); see FORWARDING in vsh(1)",
        status=USAGE_STATUS,
    )
