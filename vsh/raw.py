"""A connection that carries no frames, joined to this process's stdin and stdout."""

import _socket
import os
import stat

from vshd.carry.bridge import Pairs, Side


def join_stdio(fd: int, rest: bytes) -> None:
    """Carries between stdio and the connection `fd` until both ways have ended. rest: what was read from it already."""
    pairs = Pairs()
    pairs.add(_Stdio(), Side(fd), to_left=rest)
    while pairs.count:
        pairs.turn()


def join_stdio_to_server(fd: int, rest: bytes) -> bool:
    """The same with a server that ends after its client: its own end is the end of both ways. Whether stdin had ended
    before, and nothing was reset.
    """
    pairs = Pairs()
    pair = pairs.add(_Stdio(), Side(fd), to_left=rest)
    to_server, from_server = pair.ways
    while pairs.count and not from_server.is_over:
        pairs.turn()
    is_whole = to_server.is_over and not pair.is_reset
    pairs.close()
    return is_whole


class _Stdio(Side):
    """This process's stdin and stdout."""

    # They stay open until this process ends.
    is_ended_by_close = False

    def __init__(self) -> None:
        self.reading = 0
        self.writing = 1
        # See vsh.stdio.
        self.is_spliceable = not any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in (0, 1))
        self._was_blocking = [os.get_blocking(fd) for fd in (0, 1)]
        for fd in (0, 1):
            # The open file may be shared with the process that started us: it gets its mode back.
            os.set_blocking(fd, False)

    def end(self) -> None:
        null = os.open("/dev/null", os.O_WRONLY)
        os.set_blocking(1, self._was_blocking[1])
        _shut_if_socket(1)
        os.dup2(null, 1)
        os.close(null)

    def stop(self) -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        os.set_blocking(0, self._was_blocking[0])
        os.dup2(null, 0)
        os.close(null)

    def close(self, *, is_reset: bool = False) -> None:
        for fd, was_blocking in zip((0, 1), self._was_blocking, strict=True):
            try:
                os.set_blocking(fd, was_blocking)
            except OSError:
                pass


def _shut_if_socket(fd: int) -> None:
    """A socketpair as stdin and stdout (ssh's ProxyCommand has one): only shutdown() ends one way of it."""
    duplicate = os.dup(fd)
    try:
        connection = _socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return
    try:
        connection.shutdown(_socket.SHUT_WR)
    except OSError:
        pass
    connection.close()
