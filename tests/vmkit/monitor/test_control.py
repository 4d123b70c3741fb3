"""The control socket: words and answers, long lines, many askers, stuck askers; everyone hears the end."""

import asyncio
import json
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from vmkit.monitor import control as control_module
from vmkit.monitor.control import MAX_ASKERS, MAX_LINE_BYTES, ControlServer, parse_request, render_end
from vmkit.monitor.end import End

DEADLINE_S = 10.0
END = End("panic", "it panicked", details="never sent", hint="nor this")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
        yield Path(folder) / "monitor.sock"


class Room:
    """A served control socket and what was asked through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verbs: list[str] = []
        self.control = ControlServer(self.verbs.append)

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


@pytest.mark.parametrize(
    ("line", "verb"),
    [
        (b'{"do": "stopping"}\n', "stopping"),
        (b'{"do": "quit"}', "quit"),
        (b'{"do": "kill", "more": 1}', "kill"),
        (b'{"do": "watch"}', "watch"),
        (b'{"do": "dance"}', None),
        (b'{"do": ["quit"]}', None),
        (b'{"do": null}', None),
        (b'["quit"]', None),
        (b'"quit"', None),
        (b"quit", None),
        (b"\xff", None),
        (b"", None),
        (b"[" * 4000, None),
    ],
)
def test_request_is_a_known_verb_or_nothing(line: bytes, verb: str | None) -> None:
    assert parse_request(line) == verb


def test_end_is_told_without_the_consoles_lines() -> None:
    assert json.loads(render_end(END)) == {"end": "panic", "brief": "it panicked", "expected": False}


def test_every_request_is_answered_and_heard_in_order(path: Path) -> None:
    async def scene(room: Room) -> None:
        reader, writer = await room.ask(b'{"do": "wa', b'tch"}\n{"do": "stopping"}\nnonsense\n')
        assert json.loads(await reader.readline()) == {"ok": True}
        assert json.loads(await reader.readline()) == {"ok": True}
        assert json.loads(await reader.readline()) == {"error": "unknown request"}
        writer.close()

    assert play(path, scene).verbs == ["watch", "stopping"]


def test_every_asker_hears_the_end_and_then_the_close(path: Path) -> None:
    async def scene(room: Room) -> None:
        askers = [await room.ask(b'{"do": "watch"}\n') for _ in range(5)]
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
        honest, writer = await room.ask(b'{"do": "watch"}\n')
        await honest.readline()
        reader, other = await room.ask(b"x" * (4 * MAX_LINE_BYTES))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.write(b'{"do": "stopping"}\n')
        assert json.loads(await honest.readline()) == {"ok": True}
        writer.close()
        other.close()

    assert play(path, scene).verbs == ["watch", "stopping"]


def test_askers_have_a_ceiling(path: Path) -> None:
    async def scene(room: Room) -> None:
        writers = []
        for _ in range(MAX_ASKERS):
            reader, writer = await room.ask(b'{"do": "watch"}\n')
            await reader.readline()
            writers.append(writer)
        reader, writer = await room.ask()
        assert await reader.read() == b""
        writers.pop().close()
        while len(room.control._askers) == MAX_ASKERS:
            await asyncio.sleep(0)
        reader, again = await room.ask(b'{"do": "watch"}\n')
        assert json.loads(await reader.readline()) == {"ok": True}
        for one in (*writers, writer, again):
            one.close()

    play(path, scene)


def test_asker_that_never_reads_waits_and_holds_up_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "LAST_WORDS_DEADLINE_S", 0.05)

    async def scene(room: Room) -> None:
        _, flood = await asyncio.open_unix_connection(path)
        while flood.transport.get_write_buffer_size() < 500_000:
            flood.write(b'{"do": "watch"}\n' * 1000)
            await asyncio.sleep(0)
        (asker,) = room.control._askers
        for _ in range(1000):
            await asyncio.sleep(0)
        assert asker.transport.get_write_buffer_size() < 200_000
        reader, writer = await room.ask(b'{"do": "stopping"}\n')
        assert json.loads(await reader.readline()) == {"ok": True}
        writer.close()
        room.control.announce_end(END)
        await room.control.close()
        flood.transport.abort()

    assert play(path, scene).verbs[-1] == "stopping"


def test_asker_that_goes_away_at_once_is_heard_and_forgotten(path: Path) -> None:
    async def scene(room: Room) -> None:
        _, writer = await room.ask(b'{"do": "kill"}\n')
        writer.transport.abort()
        while not room.verbs or room.control._askers:
            await asyncio.sleep(0)

    assert play(path, scene).verbs == ["kill"]
