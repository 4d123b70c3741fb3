"""systemd's private bus, played: the server's end of D-Bus over a real socket, and messages that systemd sends."""

import os
import socket
import struct
from pathlib import Path

from tests.vsh.live import DEADLINE_S
from vshd.wire import dbus
from vshd.wire.dbus import encode_message

GUID = "0123456789abcdef0123456789abcdef"
UNIT_PATH = "/org/freedesktop/systemd1/unit/"
SERVICE, UNIT = "org.freedesktop.systemd1.Service", "org.freedesktop.systemd1.Unit"


def pack(out: bytearray, signature: str, value: object) -> None:
    """Writes one value of a type that systemd sends."""
    letter = signature[0]
    alignment = {"y": 1, "g": 1, "v": 1, "x": 8, "t": 8, "d": 8, "(": 8, "{": 8}.get(letter, 4)
    out += bytes(-len(out) % alignment)
    if letter in "ybiuxtd":
        assert isinstance(value, int)
        out += struct.pack("<" + {"y": "B", "b": "I", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}[letter], value)
    elif letter in "sog":
        assert isinstance(value, bytes)
        out += (bytes((len(value),)) if letter == "g" else struct.pack("<I", len(value))) + value + b"\0"
    elif letter == "v":
        assert isinstance(value, tuple)
        pack(out, "g", value[0].encode())
        pack(out, value[0], value[1])
    elif letter == "a":
        inner = signature[1:]
        assert isinstance(value, (list, dict, bytes))
        at = len(out)
        out += bytes(4)
        out += bytes(-len(out) % (8 if inner[0] in "({xtd" else 4 if inner[0] not in "ygv" else 1))
        start = len(out)
        for one in value.items() if isinstance(value, dict) else value:
            pack(out, inner, one)
        struct.pack_into("<I", out, at, len(out) - start)
    else:
        assert isinstance(value, tuple)
        for kind, one in zip(dbus.split(signature[1:-1]), value, strict=True):
            pack(out, kind, one)


def pack_all(signature: str, *values: object) -> bytes:
    """A body."""
    out = bytearray()
    for kind, value in zip(dbus.split(signature), values, strict=True):
        pack(out, kind, value)
    return bytes(out)


def make_signal(path: str, member: str, signature: str, *values: object) -> bytes:
    fields = ((dbus.PATH, path.encode()), (dbus.INTERFACE, b"a.b"), (dbus.MEMBER, member.encode()))
    return encode_message(dbus.SIGNAL, 1, fields, body=pack_all(signature, *values), signature=signature)


def make_answer(serial: int, signature: str, *values: object, kind: int = dbus.RETURN) -> bytes:
    fields = ((dbus.REPLY_TO, struct.pack("<I", serial)),)
    return encode_message(kind, 1, fields, body=pack_all(signature, *values), signature=signature)


Properties = dict[bytes, tuple[str, object]]


def make_properties(number: int = 1, **more: tuple[str, object]) -> tuple[Properties, Properties]:
    """The properties of a service whose main process has exited with 3, and of its unit. number: of the run."""
    service: Properties = {
        b"StatusText": ("s", b"well"),
        b"Result": ("s", b"exit-code"),
        b"ExecMainCode": ("i", 1),
        b"ExecMainStatus": ("i", 3),
        b"ExecMainPID": ("u", 100 + number),
        b"ExecMainExitTimestamp": ("t", 1_700_000_000_000_000 + number),
        b"NRestarts": ("u", number - 1),
        b"Commands": ("a(sasb)", [(b"/bin/false", [b"false"], 1)]),
    }
    unit: Properties = {
        b"ActiveState": ("s", b"failed"),
        b"SubState": ("s", b"failed"),
        b"InvocationID": ("ay", bytes((number,)) * 16),
        b"StateChangeTimestamp": ("t", 1_700_000_001_000_000),
        b"Job": ("(uo)", (0, b"/")),
    }
    for key, value in more.items():
        (service if key.encode() in service else unit)[key.encode()] = value
    return service, unit


def make_change(name: str = "web", number: int = 1, **more: tuple[str, object]) -> bytes:
    """What systemd sends when a service has changed."""
    path = f"{UNIT_PATH}{name}_2eservice"
    service, unit = make_properties(number, **more)
    return b"".join(
        make_signal(path, "PropertiesChanged", "sa{sv}as", interface.encode(), properties, [b"ExecStart"])
        for interface, properties in ((SERVICE, service), (UNIT, unit))
    )


class PrivateBus:
    """The server. `failed` are the names of the services that it lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: dict[str, tuple[Properties, Properties]] = {}
        self.calls: list[bytes] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._listening.settimeout(DEADLINE_S)
        self._client: socket.socket | None = None

    def accept(self, answer: bytes = f"OK {GUID}\r\n".encode()) -> None:
        """Lets the next client in."""
        self.drop()
        self._client = self._listening.accept()[0]
        self._client.settimeout(DEADLINE_S)
        assert self._read_until(b"\r\n") == b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n"
        self._client.sendall(answer)

    def meet(self) -> bytes:
        """What the next client sends before it closes the connection, behind its authentication."""
        with self._listening.accept()[0] as client:
            client.settimeout(DEADLINE_S)
            return client.recv(1)

    def serve(self) -> None:
        """Answers the client's first calls, and those for what it was told."""
        begun = self._read_until(b"BEGIN\r\n")
        assert begun == b"BEGIN\r\n", begun
        self._answer_call()
        self._answer_call()
        for _ in range(2 * len(self.failed)):
            self._answer_call()

    def send(self, data: bytes) -> None:
        assert self._client is not None
        self._client.sendall(data)

    def drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        self.drop()
        self._listening.close()
        self.path.unlink()

    def _answer_call(self) -> None:
        head = self._read(dbus.HEAD_SIZE)
        body_size, serial, fields_size = struct.unpack_from("<III", head, 4)
        rest = self._read((fields_size + 7 & ~7) + body_size)
        call = head + rest
        self.calls.append(call)
        if b"ListUnitsByPatterns" in call:
            self.send(make_answer(serial, "a(ssssssouso)", [self._make_row(name) for name in self.failed]))
        elif b"GetAll" in call:
            name = call.partition(UNIT_PATH.encode())[2].partition(b"_2eservice")[0].decode()
            service, unit = self.failed[name]
            self.send(make_answer(serial, "a{sv}", service if SERVICE.encode() in call else unit))
        else:
            self.send(make_answer(serial, ""))

    def _make_row(self, name: str) -> tuple[object, ...]:
        words = (name.encode() + b".service", b"", b"loaded", b"failed", b"failed", b"")
        return (*words, f"{UNIT_PATH}{name}_2eservice".encode(), 0, b"", b"/")

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._read_some(size - len(data))
        return data

    def _read_until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            data += self._read_some(1)
        return data

    def _read_some(self, size: int) -> bytes:
        assert self._client is not None
        data = self._client.recv(size)
        assert data
        return data
