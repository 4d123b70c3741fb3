"""The local terminal: its size, raw mode, and the way back from it, whatever happens.

Raw is what cfmakeraw(3) makes. The way back is taken on every exit of this process that it can see.
"""

import atexit
import struct
import termios
from fcntl import ioctl

from vsh import signals
from vsh.stdio import is_background

TYPE_CHECKING = False
if TYPE_CHECKING:
    Attributes = list[int | list[bytes | int]]

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
    """A terminal, raw between enter() and leave(), which may alternate, for as long as its foreground job is ours.

    Invariant: `_original` is set while there is something to restore; `_raw` is what replaced it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._original: Attributes | None = None
        self._raw: Attributes | None = None
        self._is_wanted = False
        # No other job has had the terminal since we made it raw.
        self._is_current = False
        atexit.register(self.leave)

    def enter(self) -> bool:
        """Raw from now on; typed-ahead input stays. Call it again before each read.

        False while the terminal belongs to another job: it is left alone then, and must not be read.
        """
        if not self._is_wanted:
            self._is_wanted = True
            signals.on_continue(self._look_again)
        if is_background(self._fd):
            self._is_current = False
            return False
        if not self._is_current:
            self._is_current = True
            self._make_raw()
        return True

    def leave(self) -> None:
        """As it was. Never waits: what stalls output must not keep the terminal raw.

        From the background, too, unless the job that has the terminal now has set it for itself.
        """
        self._is_wanted = self._is_current = False
        if self._original is not None:
            original, self._original = self._original, None
            if not is_background(self._fd) or _read(self._fd) == self._raw:
                _write(self._fd, original)

    def _make_raw(self) -> None:
        attributes = _read(self._fd)
        if attributes is None:
            return
        if self._original is None or attributes != self._raw:
            self._original = attributes
        _write(self._fd, _make_raw(self._original))
        self._raw = _read(self._fd)

    def _look_again(self) -> None:
        """We were stopped: another job had the terminal, and may have set it."""
        if self._is_wanted:
            self._is_current = False
            self.enter()


def _read(fd: int) -> "Attributes | None":
    try:
        return termios.tcgetattr(fd)
    except termios.error:
        return None


def _write(fd: int, attributes: "Attributes") -> None:
    """Sets them. From the background the kernel would stop us, unless SIGTTOU is blocked."""
    before = signals.block(signals.SIGTTOU)
    try:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    except termios.error:
        # The terminal is gone.
        pass
    finally:
        signals.restore_mask(before)


def _make_raw(saved: "Attributes") -> "Attributes":
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
