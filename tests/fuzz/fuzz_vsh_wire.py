"""Fuzzes everything of vsh and vshd that reads bytes of a peer or words of a user.

Targets: the codec, frames, both sides of a connection fed with damaged transcripts, two sides that speak correctly at
random and must agree, command lines, and a real vshd. A case must end, keep its memory bounded, and fail only in the
ways it may.
Longer than under pytest: python -m tests.fuzz.fuzz_vsh_wire --cases 100000 --seed 1 [--target NAME]
"""

import argparse
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.vsh.live import Vshd, wait_until
from tests.vshd.transcripts import SESSIONS
from vsh.address import Address
from vsh.config import apply_config
from vsh.errors import VshError
from vsh.flags import parse_flags, split_command
from vsh.forward.spec import DYNAMIC, LOCAL, REMOTE, parse_forward, parse_target
from vsh.transport import ask_for_port
from vshd.flags import FlagError
from vshd.flags import parse_flags as parse_daemon_flags
from vshd.wire import messages, proto3
from vshd.wire.client import ClientConnection
from vshd.wire.connection import MAX_DATA_RANGE, Connection, default_limits
from vshd.wire.errors import LocalProtocolError, RemoteProtocolError
from vshd.wire.events import Broken, Data, Event, RequestReceived
from vshd.wire.frames import DataPiece, FrameReader, encode_data_head, encode_frame
from vshd.wire.messages import (
    ConnectionStatusMessage,
    CreditMessage,
    DataMessage,
    Extended,
    Failure,
    GuestMessage,
    HostMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
    WindowResizeMessage,
)
from vshd.wire.proto3 import Message, Oneof
from vshd.wire.requests import Forward
from vshd.wire.server import ServerConnection

MESSAGES: tuple[type[Message | Oneof], ...] = (
    ConnectionStatusMessage,
    CreditMessage,
    DataMessage,
    Extended,
    Failure,
    Forward,
    GuestMessage,
    HostMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
    WindowResizeMessage,
)
# What a connection may hold of a peer's bytes: one payload, one head, and what came too early.
HELD_MAX = MAX_DATA_RANGE[1] + (1 << 17)


def random_value(rng: random.Random, kind: int, message: type[Message | Oneof] | None) -> Any:
    if kind == proto3.BOOL:
        return rng.random() < 0.8
    if kind in (proto3.BYTES,):
        return rng.randbytes(rng.choice((0, 1, 5, 130)))
    if kind == proto3.BYTES_LIST:
        return [rng.randbytes(rng.randrange(20)) for _ in range(rng.randrange(4))]
    if kind == proto3.BYTES_MAP:
        return {rng.randbytes(rng.randrange(6)): rng.randbytes(rng.randrange(6)) for _ in range(rng.randrange(4))}
    if kind == proto3.MESSAGE:
        assert message
        return random_message(rng, message)
    if kind in (proto3.INT32, proto3.SINT32):
        return rng.choice((0, 1, 2, 3, -1, 127, 2**31 - 1, -(2**31)))
    return rng.choice((0, 1, 2, 3, 64, 300, 4096, 1 << 20, 2**32 - 1))


M = TypeVar("M", bound=Message | Oneof)


def random_message(rng: random.Random, kind: type[M]) -> M:
    made = kind()
    if isinstance(made, proto3.Oneof):
        field = rng.choice(kind.FIELDS)
        made.member = field.number
        made.value = random_value(rng, field.kind, field.message)
        return made
    for field in kind.FIELDS:
        if rng.random() < 0.5:
            setattr(made, field.name, random_value(rng, field.kind, field.message))
    return made


def damage(rng: random.Random, original: bytes) -> bytes:
    """Some bytes changed, cut out, doubled, or put in."""
    data = bytearray(original)
    for _ in range(rng.randrange(4)):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                data[at:at] = rng.choice((b"\xff" * 4, b"\x80" * 11, b"\x00" * 5, rng.randbytes(7)))
    return bytes(data)


def cut(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """The same bytes in random pieces."""
    position = 0
    while position < len(data):
        size = rng.choice((1, 2, 3, 5, 16, 100, 5000, len(data)))
        yield data[position : position + size]
        position += size


def plain(message: object) -> object:
    """A message as something to compare."""
    if isinstance(message, proto3.Oneof):
        return (message.member, plain(message.value) if isinstance(message.value, proto3.Message) else message.value)
    if isinstance(message, proto3.Message):
        return {field.name: plain(getattr(message, field.name)) for field in message.FIELDS}
    return message


def fuzz_codec(rng: random.Random) -> None:
    kind = rng.choice(MESSAGES)
    made = random_message(rng, kind)
    again = kind()
    again.merge(made.encode())
    assert plain(again) == plain(made)
    damaged = kind()
    try:
        damaged.merge(damage(rng, made.encode()))
    except RemoteProtocolError:
        return
    repeated = kind()
    repeated.merge(damaged.encode())
    assert plain(repeated) == plain(damaged)


def read_frames(pieces: Iterable[bytes], limit: int, splits: bool) -> list[bytes | tuple[int, bytes]]:
    reader = FrameReader(limit)
    reader.splits_data = splits
    found: list[bytes | tuple[int, bytes]] = []
    for piece in pieces:
        view = memoryview(piece)
        position = 0
        while True:
            position, item = reader.receive(view, position)
            if item is None:
                break
            if not isinstance(item, DataPiece):
                found.append(item)
            elif found and isinstance(found[-1], tuple) and found[-1][0] == item.stream:
                found[-1] = (item.stream, found[-1][1] + bytes(item.data))
            else:
                found.append((item.stream, bytes(item.data)))
        assert position == len(view)
    return found


def fuzz_frames(rng: random.Random) -> None:
    data = b""
    for _ in range(rng.randrange(6)):
        if rng.random() < 0.5:
            size = rng.choice((1, 3, 127, 128, 4000))
            data += encode_data_head(rng.randrange(1, 4), size) + bytes(size)
        else:
            data += encode_frame(random_message(rng, rng.choice(MESSAGES)).encode()[:4096], 4096)
    if rng.random() < 0.6:
        data = damage(rng, data)
    splits = rng.random() < 0.8
    results: list[str | list[bytes | tuple[int, bytes]]] = []
    for pieces in ([data], list(cut(rng, data))):
        try:
            results.append(read_frames(pieces, 4096, splits))
        except RemoteProtocolError as error:
            results.append(str(error))
    if not any(isinstance(result, str) for result in results):
        assert results[0] == results[1]
    else:
        assert isinstance(results[0], str)
        assert isinstance(results[1], str)


def random_talk(rng: random.Random, kind: type[Oneof], is_extended: bool) -> bytes:
    """Frames of one side, some of them nonsense."""
    frames, _, _, _, _, _, _ = rng.choice(list(SESSIONS.values()))
    who = "S>C" if kind is HostMessage else "C>S"
    data = b"".join(frame for speaker, frame in frames if speaker == who)
    if is_extended:
        if kind is HostMessage:
            answer = SetupConnectionResponse(messages.READY, b"", 1, default_limits())
            data = encode_frame(answer.encode(), 4096)
        else:
            request = SetupConnectionRequest(argv=[b"x"], extended=(limits := default_limits()))
            if rng.random() < 0.3:
                limits.request_size = rng.choice((1, 30, 5000, 1 << 24))
            data = encode_frame(request.encode(), 4096)
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.4:
            size = rng.choice((1, 50, 4000, 5000, 100_000 if is_extended else 4000))
            data += encode_data_head(rng.choice((0, 1, 2, 3, 9)), size) + bytes(size)
        else:
            data += encode_frame(random_message(rng, kind).encode(), 1 << 20)
    return damage(rng, data) if rng.random() < 0.7 else data


def held(connection: Connection) -> int:
    """How much a connection keeps of what its peer sent."""
    reader = connection._reader
    size = len(reader._head) + len(reader._payload or b"") + len(connection._early)
    return size + len(getattr(connection, "_chunks", b""))


def fuzz_server(rng: random.Random) -> None:
    server = ServerConnection(rng.choice((None, default_limits())))
    ceiling = HELD_MAX
    for piece in cut(rng, random_talk(rng, GuestMessage, rng.random() < 0.7)):
        events = server.receive_data(piece)
        while events:
            follow = []
            for event in events:
                if isinstance(event, RequestReceived):
                    if rng.random() < 0.2:
                        server.refuse("no", Failure(messages.OTHER))
                    else:
                        server.accept(1)
                        follow += server.receive_data(b"")
                elif isinstance(event, Data) and rng.random() < 0.9:
                    server.consumed(event.stream, len(event.data))
            events = follow
        assert held(server) <= ceiling
        if rng.random() < 0.5:
            server.output.take()
    server.receive_end()
    assert server.is_finished
    server.send_failure("over", Failure(messages.PROTOCOL))


def fuzz_client(rng: random.Random) -> None:
    client = ClientConnection(rng.choice((None, default_limits())))
    try:
        client.send_setup(SetupConnectionRequest(argv=[b"x" * rng.choice((1, 5000))]))
    except LocalProtocolError:
        return
    for piece in cut(rng, random_talk(rng, HostMessage, rng.random() < 0.7)):
        for event in client.receive_data(piece):
            if isinstance(event, Data) and rng.random() < 0.9:
                client.consumed(event.stream, len(event.data))
        room = client.send_room(messages.STDIN)
        if room:
            client.send_data(messages.STDIN, bytes(min(room, 1000)))
        assert held(client) <= HELD_MAX
        if rng.random() < 0.5:
            client.output.take()
    client.receive_end()
    assert client.is_finished


class Side:
    """One correct speaker: what it said, what it heard, and what it has not consumed yet."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.said = dict.fromkeys(connection.sending, b"")
        self.heard = dict.fromkeys(connection.receiving, b"")
        self.unconsumed = dict.fromkeys(connection.receiving, 0)

    def act(self, rng: random.Random) -> None:
        connection = self.connection
        stream = rng.choice(list(connection.sending))
        room = connection.send_room(stream)
        if room and rng.random() < 0.7:
            data = rng.randbytes(min(room, rng.choice((1, 100, 4000, 5001, 20_000))))
            connection.send_data(stream, data)
            self.said[stream] += data
        elif rng.random() < 0.1:
            connection.send_end(stream)
        elif rng.random() < 0.1:
            connection.send_alive()
        for stream, size in self.unconsumed.items():
            part = rng.randrange(size + 1)
            connection.consumed(stream, part)
            self.unconsumed[stream] -= part

    def hear_piece(self, rng: random.Random, piece: bytes) -> None:
        """Receives it; of a large frame's data some is taken past the connection, as drivers splice it."""
        connection = self.connection
        while piece:
            room = max((connection.bulk_room(stream), stream) for stream in self.heard)
            if room[0] and rng.random() < 0.5:
                taken = piece[: rng.randrange(1, room[0] + 1)]
                connection.took(room[1], len(taken))
                self.heard[room[1]] += taken
                self.unconsumed[room[1]] += len(taken)
            else:
                taken = piece[: rng.choice((connection.bulk_head_size or 1, 1000, len(piece)))]
                self.hear(connection.receive_data(taken))
            piece = piece[len(taken) :]

    def hear(self, events: list[Event]) -> None:
        for event in events:
            assert not isinstance(event, Broken), event.reason
            if isinstance(event, Data):
                self.heard[event.stream] += bytes(event.data)
                self.unconsumed[event.stream] += len(event.data)
            elif isinstance(event, RequestReceived):
                assert isinstance(self.connection, ServerConnection)
                self.connection.accept(1)
                self.hear(self.connection.receive_data(b""))


def random_limits(rng: random.Random) -> Extended | None:
    if rng.random() < 0.2:
        return None
    limits = default_limits()
    limits.max_data = rng.choice((0, 4000, 5000, 100_000))
    limits.window = rng.choice((0, 4000, 9000, 1 << 20))
    return limits


def fuzz_duo(rng: random.Random) -> None:
    connection = ClientConnection(random_limits(rng))
    client, server = Side(connection), Side(ServerConnection(random_limits(rng)))
    connection.send_setup(SetupConnectionRequest(argv=[b"x"]))
    for _ in range(40):
        for speaker, listener in ((client, server), (server, client)):
            for piece in cut(rng, speaker.connection.output.take()):
                listener.hear_piece(rng, piece)
            speaker.act(rng)
    for _ in range(3):
        for speaker, listener in ((client, server), (server, client)):
            listener.hear(listener.connection.receive_data(speaker.connection.output.take()))
    assert client.heard == server.said
    assert server.heard == client.said


WORDS = [
    "--cid=3",
    "--cid",
    "3",
    "-t",
    "--",
    "--user",
    "x",
    "A=b",
    "--env",
    "A=",
    "--timeout=1e400",
    "-",
    "",
    "--=",
    "-=1",
    "ls",
]


def fuzz_flags(rng: random.Random) -> None:
    words = []
    for _ in range(rng.randrange(8)):
        word = rng.choice(WORDS)
        if rng.random() < 0.4:
            word = damage(rng, word.encode()).decode("utf-8", "surrogateescape")
        words.append(word)
    with contextlib.suppress(VshError):
        options = parse_flags(words)
        environment, argv = split_command(options.command)
        assert len(argv) <= len(words)
        assert all(environment)
    with contextlib.suppress(FlagError):
        parse_daemon_flags(words)


CONFIGURATION = """\
[default]
keepalive = 60
[host.web]
vm_name = "tiny"
env = ["A=b"]
tty = true
[host.cold]
cid = 7
timeout = 1.5
"""


def fuzz_config(rng: random.Random) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(damage(rng, CONFIGURATION.encode()))
        file.flush()
        os.environ["VSH_CONFIG"] = file.name
        try:
            with contextlib.suppress(VshError):
                apply_config(parse_flags(["--vm_name=web"]))
        finally:
            del os.environ["VSH_CONFIG"]


def fuzz_forwards(rng: random.Random) -> None:
    """-L, -R, -D, --proxy: what is understood can be said again, and means the same."""
    words = (
        "80",
        "0",
        "65536",
        "4294967295",
        "localhost",
        "*",
        "",
        "[::1]",
        "[",
        "]",
        "/run/x",
        "tcp",
        "unix",
        "vsock",
    )
    text = ":".join(rng.choice(words) for _ in range(rng.randrange(1, 8)))
    if rng.random() < 0.3:
        text = "".join(rng.choice(text + ":/[]") for _ in range(rng.randrange(1, 20)))
    for kind in (LOCAL, REMOTE):
        with contextlib.suppress(VshError):
            forward = parse_forward(kind, text)
            assert parse_forward(kind, f"{forward.listen}:{forward.target}") == forward, text
    with contextlib.suppress(VshError):
        forward = parse_forward(DYNAMIC, text)
        assert parse_forward(DYNAMIC, forward.listen) == forward, text
    with contextlib.suppress(VshError):
        target = parse_target(text)
        assert parse_target(target) == target, text


def fuzz_connect_answer(rng: random.Random) -> None:
    """What a hybrid vsock may answer to CONNECT."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(damage(rng, b"OK 1073741824\n") or b"x")
        theirs.close()
        with contextlib.suppress(VshError):
            ask_for_port(Address.hybrid("fuzz"), ours.fileno(), time.monotonic() + 5)


class LiveTarget:
    """A real vshd, spoken to in nonsense; it must serve the next client, and leave nothing behind."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.server = Vshd(Path(self._folder.name), ["--handshake_timeout=1", "--max_sessions=1000"])

    def __call__(self, rng: random.Random) -> None:
        data = random_talk(rng, GuestMessage, rng.random() < 0.7)
        if rng.random() < 0.4:
            data = damage(rng, b"CONNECT 9001\n") + data
        with self.server.connect() as connection, contextlib.suppress(OSError):
            for piece in cut(rng, data):
                connection.sendall(piece)
            if rng.random() < 0.5:
                connection.settimeout(0.05)
                connection.recv(1 << 16)
            if rng.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """It must be as healthy as before; stopped in every case."""
        try:
            wait_until(lambda: not self.server.children(), "no session is left behind")
            done = self.server.run("--", "echo", "still")
            assert done.stdout == b"still\n"
            assert "Error:" not in self.server.log, self.server.log
        finally:
            status = self.server.stop()
            self._folder.cleanup()
        assert status == 0


TARGETS = {
    "codec": fuzz_codec,
    "frames": fuzz_frames,
    "server": fuzz_server,
    "client": fuzz_client,
    "duo": fuzz_duo,
    "flags": fuzz_flags,
    "config": fuzz_config,
    "connect": fuzz_connect_answer,
    "forwards": fuzz_forwards,
}


def run_cases(name: str, cases: int, seed: int) -> None:
    """Runs `cases` cases of one target; a failure names the command that repeats it."""
    with contextlib.ExitStack() as stack:
        target = TARGETS.get(name)
        if target is None:
            target = LiveTarget()
            stack.callback(target.close)
        for number in range(seed, seed + cases):
            try:
                target(random.Random(number))
            except BaseException as error:
                error.add_note(f"python -m tests.fuzz.fuzz_vsh_wire --target {name} --cases 1 --seed {number}")
                raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*TARGETS, "live"])
    options = parser.parse_args()
    for name in [options.target] if options.target else [*TARGETS, "live"]:
        cases = options.cases // 100 + 1 if name == "live" and not options.target else options.cases
        started = time.monotonic()
        run_cases(name, cases, options.seed)
        print(f"{name}: {cases} cases in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
