"""The local terminal: its size, raw mode, and the way back from it, whatever happens.

Raw is what cfmakeraw(3) makes. The way back is taken on every exit of this process that it can see.
"""

import atexit
import struct
import termios
from fcntl import ioctl

WINDOW_SIZE_BYTES = 8


def find_size() -> tuple[int, int]:
    """Rows and columns of the terminal among stdin, stdout, stderr; (0, 0) when there is none."""
    for fd in (0, 1, 2):
        try:
            rows, cols = struct.unpack("HHHH", ioctl(fd, termios.TIOCGWINSZ, bytes(WINDOW_SIZE_BYTES)))[:2]
        except OSError:
            continue
        if rows and cols:
            return rows, cols
    return 0, 0


class RawTerminal:
    """A terminal, raw between enter() and leave(), which may alternate. Invariant: `_saved` is set while it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None
        atexit.register(self.leave)

    def enter(self) -> None:
        """Raw from now on; typed-ahead input stays."""
        if self._saved is not None:
            return
        try:
            saved = termios.tcgetattr(self._fd)
        except termios.error:
            return
        self._saved = saved
        self._set(_make_raw(saved))

    def leave(self) -> None:
        """As it was. Never waits: what stalls output must not keep the terminal raw."""
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self._set(saved)

    def _set(self, attributes: "list[int | list[bytes | int]]") -> None:
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
        except termios.error:
            pass


def _make_raw(saved: "list[int | list[bytes | int]]") -> "list[int | list[bytes | int]]":
    """cfmakeraw(3), in the order of termios: iflag, oflag, cflag, lflag, ispeed, ospeed, cc."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = saved
    assert isinstance(iflag, int) and isinstance(oflag, int) and isinstance(cflag, int) and isinstance(lflag, int)
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
