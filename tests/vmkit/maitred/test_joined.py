"""Writes that are joined leave at the end of the loop's turn, in one piece, and none is lost."""

import asyncio
import socket

import pytest

from vmkit.maitred.joined import join_writes


async def write(*, is_closed: bool) -> None:
    sock, far = socket.socketpair()
    sock.setblocking(False)
    with far:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=sock)
        joined = join_writes(transport)
        for piece in (b"head ", b"", b"message ", b"end"):
            joined.write(piece)
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)
        if is_closed:
            joined.close()
        else:
            await asyncio.sleep(0)
        assert far.recv(100) == b"head message end"
        assert joined.is_closing() is is_closed
        transport.abort()


@pytest.mark.parametrize("is_closed", [False, True])
def test_writes_of_a_turn_leave_in_one_piece(is_closed: bool) -> None:
    asyncio.run(write(is_closed=is_closed))


async def close_first() -> None:
    sock, far = socket.socketpair()
    sock.setblocking(False)
    with far:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=sock)
        joined = join_writes(transport)
        joined.write(b"too late")
        transport.abort()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert far.recv(100) == b""


def test_connection_that_has_ended_takes_no_more() -> None:
    asyncio.run(close_first())
