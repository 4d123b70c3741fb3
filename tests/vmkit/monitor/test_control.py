"""The control socket: words and answers, long lines, many askers, stuck askers; everyone hears the end."""

import asyncio
import json
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from vmkit.machine.words import MAX_REQUEST_LINE_BYTES, Answer, Ended, ExpectEnd, Quit, Request, Watch
from vmkit.monitor import control as control_module
from vmkit.monitor.control import MAX_ASKERS, ControlServer

DEADLINE_S = 10.0
END = Ended("panic", "it panicked", expected=False)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
        yield Path(folder) / "monitor.sock"


class Room:
    """A served control socket and what was asked through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.control = ControlServer(self.answer)

    async def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        return Answer(True)

    async def ask(self, *lines: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        for line in lines:
            writer.write(line)
        await writer.drain()
        return reader, writer


def play(path: Path, scene: Callable[[Room], Awaitable[None]]) -> Room:
    async def main() -> Room:
        room = Room(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(200)
            listener.setblocking(False)
            serving = asyncio.create_task(room.control.serve(listener))
            async with asyncio.timeout(DEADLINE_S):
                await scene(room)
                room.control.announce_end(END)
                serving.cancel()
                # An asker who is still connected must not keep the server.
                await asyncio.wait([serving])
                await room.control.close()
        return room

    return asyncio.run(main())


def test_every_request_is_answered_and_heard_in_order(path: Path) -> None:
    async def scene(room: Room) -> None:
        reader, writer = await room.ask(
            b'{"version": 1, "do": "wa', b'tch"}\n{"version": 1, "do": "expect-end"}\nnonsense\n'
        )
        assert json.loads(await reader.readline()) == {"ok": True}
        assert json.loads(await reader.readline()) == {"ok": True}
        assert json.loads(await reader.readline()) == {"error": "this line is no request"}
        writer.close()

    assert play(path, scene).requests == [Watch(), ExpectEnd()]


def test_every_asker_hears_the_end_and_then_the_close(path: Path) -> None:
    async def scene(room: Room) -> None:
        askers = [await room.ask(b'{"version": 1, "do": "watch"}\n') for _ in range(5)]
        for reader, _ in askers:
            assert json.loads(await reader.readline()) == {"ok": True}
        room.control.announce_end(END)
        for reader, _ in askers:
            assert json.loads(await reader.readline())["end"] == "panic"
        await room.control.close()
        for reader, writer in askers:
            assert await reader.read() == b""
            writer.close()

    play(path, scene)


def test_line_over_the_limit_ends_its_connection_only(path: Path) -> None:
    async def scene(room: Room) -> None:
        honest, writer = await room.ask(b'{"version": 1, "do": "watch"}\n')
        await honest.readline()
        reader, other = await room.ask(b"x" * (4 * MAX_REQUEST_LINE_BYTES))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.write(b'{"version": 1, "do": "expect-end"}\n')
        assert json.loads(await honest.readline()) == {"ok": True}
        writer.close()
        other.close()

    assert play(path, scene).requests == [Watch(), ExpectEnd()]


def test_askers_have_a_ceiling(path: Path) -> None:
    async def scene(room: Room) -> None:
        writers = []
        for _ in range(MAX_ASKERS):
            reader, writer = await room.ask(b'{"version": 1, "do": "watch"}\n')
            await reader.readline()
            writers.append(writer)
        reader, writer = await room.ask()
        assert await reader.read() == b""
        writers.pop().close()
        while len(room.control._askers) == MAX_ASKERS:
            await asyncio.sleep(0)
        reader, again = await room.ask(b'{"version": 1, "do": "watch"}\n')
        assert json.loads(await reader.readline()) == {"ok": True}
        for one in (*writers, writer, again):
            one.close()

    play(path, scene)


def test_asker_that_never_reads_waits_and_holds_up_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "LAST_WORDS_DEADLINE_S", 0.05)

    async def scene(room: Room) -> None:
        _, flood = await asyncio.open_unix_connection(path)
        while flood.transport.get_write_buffer_size() < 500_000:
            flood.write(b'{"version": 1, "do": "watch"}\n' * 1000)
            await asyncio.sleep(0)
        (asker,) = room.control._askers
        for _ in range(1000):
            await asyncio.sleep(0)
        assert asker.transport.get_write_buffer_size() < 200_000
        reader, writer = await room.ask(b'{"version": 1, "do": "expect-end"}\n')
        assert json.loads(await reader.readline()) == {"ok": True}
        writer.close()
        room.control.announce_end(END)
        await room.control.close()
        flood.transport.abort()

    assert play(path, scene).requests[-1] == ExpectEnd()


def test_asker_that_goes_away_at_once_is_heard_and_forgotten(path: Path) -> None:
    async def scene(room: Room) -> None:
        _, writer = await room.ask(b'{"version": 1, "do": "quit"}\n')
        writer.transport.abort()
        while not room.requests or room.control._askers:
            await asyncio.sleep(0)

    assert play(path, scene).requests == [Quit()]
