"""The guest's console: logged, searched, shown; hostile output, slow readers and stuck guests do no harm."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vmkit.monitor import console as console_module
from vmkit.monitor.console import HISTORY_BYTES, MAX_ATTACHED, MAX_BACKLOG_BYTES, Console, ConsoleTrouble, Trouble
from vmkit.monitor.logs import CappedLog

DEADLINE_S = 10.0


class Room:
    """A console with the guest's end in our hand, and terminals that attach to it."""

    def __init__(self, folder: Path) -> None:
        ours, self.guest = socket.socketpair()
        self.guest.setblocking(False)
        self.log = folder / "console.log"
        self.troubles: list[ConsoleTrouble] = []
        self.file = CappedLog(self.log)
        self.console = Console(ours, self.file, self.troubles.append)
        self.serving: list[asyncio.Task[None]] = []
        self.reading: asyncio.Task[None]

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.guest, data)

    async def hear(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(self.guest, size - len(data))
        return data

    async def attach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self.serving.append(asyncio.create_task(self.console.serve(reader, writer)))
        await asyncio.sleep(0)
        return await asyncio.open_unix_connection(sock=theirs)


Scene = Callable[[Room], Awaitable[None]]


def play(folder: Path, scene: Scene) -> Room:
    """Runs a scene beside the console's own reading; at its end the guest hangs up and all has been read."""
    room: Room

    async def main() -> Room:
        room = Room(folder)
        room.reading = asyncio.create_task(room.console.read_to_end())
        async with asyncio.timeout(DEADLINE_S):
            await scene(room)
            room.guest.close()
            await room.reading
            room.console.close()
            room.file.close()
            await asyncio.gather(*room.serving)
        return room

    room = asyncio.run(main())
    return room


def test_output_is_logged_as_it_came(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10

    async def scene(room: Room) -> None:
        await room.say(data)

    assert play(tmp_path, scene).log.read_bytes() == data


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_panic_is_found_however_it_arrives(tmp_path: Path, pieces: int) -> None:
    text = b"[ 1.0] fine\r\n[ 2.0] Kernel panic - not syncing: no root\r\n[ 2.1] CPU: 0\r\n"

    async def scene(room: Room) -> None:
        for start in range(0, len(text), pieces):
            await room.say(text[start : start + pieces])
            await asyncio.sleep(0)

    room = play(tmp_path, scene)
    assert room.troubles == [ConsoleTrouble(Trouble.PANIC, "no root")]
    assert room.console.trouble == room.troubles[0]


def test_first_trouble_is_told_once(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        await room.say(b"vmkit-init: error: first\nvmkit-init: error: second\nKernel panic - not syncing: x\n")

    assert play(tmp_path, scene).troubles == [ConsoleTrouble(Trouble.INIT_ERROR, "first")]


def test_words_of_a_panic_cannot_move_a_terminal(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        await room.say(b"Kernel panic - not syncing: \x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m \x08\x9b1m\xff\r\n")

    (trouble,) = play(tmp_path, scene).troubles
    assert trouble.text.isprintable()
    assert "red" in trouble.text
    assert "owned" not in trouble.text


def test_endless_line_is_cut(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        await room.say(b"Kernel panic - not syncing: " + b"a" * 3000 + b"\n")
        await room.say(b"x" * 1_000_000)

    room = play(tmp_path, scene)
    assert len(room.troubles[0].text) <= 400
    assert len(room.console.tail(15)) <= 400
    assert len(room.console._partial) <= console_module.MAX_LINE_BYTES


def test_history_has_a_ceiling_and_the_tail_is_its_end(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        for number in range(20_000):
            await room.say(b"line %d\r\n" % number)
        assert len(b"".join(room.console._history)) <= 2 * HISTORY_BYTES

    room = play(tmp_path, scene)
    assert room.console.tail(2) == "line 19998\nline 19999"


def test_tail_leaves_out_what_is_empty_or_no_text(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        await room.say("\x1b[1mb\x1b[0m\r\n\r\n  \r\n\0\0\r\nä €\u202e\r\n".encode())

    assert play(tmp_path, scene).console.tail(10) == "b\nä €"


def test_attached_terminal_sees_the_past_and_what_comes(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        await room.say(b"past ")
        while not room.console._history:
            await asyncio.sleep(0)
        reader, writer = await room.attach()
        await room.say(b"present")
        assert await reader.readexactly(12) == b"past present"
        writer.write(b"typed")
        assert await room.hear(5) == b"typed"
        writer.close()

    play(tmp_path, scene)


def test_terminal_that_ends_its_input_is_let_go(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        reader, writer = await room.attach()
        writer.write(b"last words\n")
        writer.write_eof()
        assert await room.hear(11) == b"last words\n"
        assert await reader.read() == b""
        assert not room.console._attached
        writer.close()

    play(tmp_path, scene)


def test_end_of_the_console_is_the_terminals_end(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        reader, writer = await room.attach()

        async def read() -> None:
            assert await reader.read() == b""
            writer.close()

        room.serving.append(asyncio.create_task(read()))

    assert not play(tmp_path, scene).console._attached


def test_terminal_that_does_not_read_is_dropped_and_others_are_not(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        _, stuck = await room.attach()
        reader, writer = await room.attach()
        seen = 0
        block = b"y" * 65536
        while len(room.console._attached) == 2:
            await room.say(block)
            while seen < MAX_BACKLOG_BYTES * 100 and not reader.at_eof():
                try:
                    async with asyncio.timeout(0.001):
                        seen += len(await reader.read(len(block)))
                except TimeoutError:
                    break
        assert seen >= MAX_BACKLOG_BYTES
        writer.close()
        stuck.transport.abort()

    play(tmp_path, scene)


def test_terminals_have_a_ceiling(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        writers = [(await room.attach())[1] for _ in range(MAX_ATTACHED)]
        reader, one_more = await room.attach()
        assert await reader.read() == b""
        for writer in (*writers, one_more):
            writer.close()

    play(tmp_path, scene)


def test_two_terminals_typing_into_a_guest_that_does_not_read_both_arrive(tmp_path: Path) -> None:
    """The loop knows one writer of a socket: without turns the first one would be forgotten for ever."""
    size = 2_000_000

    async def scene(room: Room) -> None:
        writers = [(await room.attach())[1] for _ in range(2)]
        for writer, letter in zip(writers, (b"a", b"b"), strict=True):
            writer.write(letter * size)
        await asyncio.sleep(0.05)
        heard = await room.hear(2 * size)
        assert heard.count(b"a") == heard.count(b"b") == size
        for writer in writers:
            writer.close()

    play(tmp_path, scene)


def test_terminal_that_types_into_a_stuck_guest_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "TYPE_DEADLINE_S", 0.05)

    async def scene(room: Room) -> None:
        reader, writer = await room.attach()
        writer.write(b"x" * 3_000_000)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert not room.console._attached
        writer.transport.abort()

    play(tmp_path, scene)


def test_flood_does_not_starve_the_rest_of_the_monitor(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        for _ in range(200):
            await room.say(b"z" * 65536)
        assert turns >= 200
        task.cancel()

    play(tmp_path, scene)


def test_console_of_the_next_boot_reaches_the_same_terminals_and_finds_its_own_trouble(tmp_path: Path) -> None:
    async def scene(room: Room) -> None:
        reader, _writer = await room.attach()
        await room.say(b"Kernel panic - not syncing: first\n")
        assert await reader.readline() == b"Kernel panic - not syncing: first\n"
        room.guest.close()
        await room.reading
        ours, room.guest = socket.socketpair()
        room.guest.setblocking(False)
        room.console.renew(ours)
        assert room.console.trouble is None
        room.reading = asyncio.create_task(room.console.read_to_end())
        await room.say(b"Kernel panic - not syncing: second\n")
        assert await reader.readline() == b"Kernel panic - not syncing: second\n"

    room = play(tmp_path, scene)
    assert [trouble.text for trouble in room.troubles] == ["first", "second"]
    assert b"first" in room.log.read_bytes()
