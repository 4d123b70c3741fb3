"""Writes vshd's lines to the kernel's log, or to syslog, and to a terminal if there is one.

vshd opens it once, as root. A session keeps the descriptor after its user switch. It never blocks and never fails: a
lost line must not cost a session.
"""

import os

# Priorities of syslog(3), facility daemon where it matters.
ERROR, WARNING, INFO, DEBUG = 3, 4, 6, 7
FACILITY_DAEMON = 3 << 3
# Bytes of a line. The kernel gives a record out in at most 2048 bytes (PRINTK_MESSAGE_MAX), and takes four of them for
# a backslash or a byte that is not ASCII. A record that does not fit hides itself and all later ones from dmesg(1).
LINE_MAX = 480
THROTTLE_S = 10.0


class Log:
    """Writes lines. Invariant: `_kmsg` and `_syslog` are descriptors we own, or -1."""

    __slots__ = ("_kmsg", "_kmsg_path", "_stderr", "_syslog")

    def __init__(self, kmsg_path: str = "/dev/kmsg") -> None:
        self._kmsg_path = kmsg_path
        self._kmsg = -1
        self._syslog = -1
        self._stderr = True

    def open(self, *, use_kmsg: bool, use_stderr: bool = False) -> None:
        """Opens the kernel's log if use_kmsg is set and it exists, else syslog's socket. use_stderr: opens neither.

        Lines also go to stderr when it is a terminal and the kernel's log is not used, or when neither log is open.
        """
        if use_stderr:
            return
        if use_kmsg:
            try:
                self._kmsg = os.open(self._kmsg_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._stderr = False
                return
            except OSError:
                pass
        self._syslog = _open_syslog()
        self._stderr = self._syslog < 0 or os.isatty(2)

    @property
    def has_stderr(self) -> bool:
        """Whether lines also go to stderr."""
        return self._stderr

    def renew(self) -> None:
        """Opens the log anew for a session. The kernel limits each opening of /dev/kmsg to 10 lines in 5 s."""
        if self._kmsg < 0:
            return
        try:
            kmsg = os.open(self._kmsg_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        os.close(self._kmsg)
        self._kmsg = kmsg

    def error(self, text: str) -> None:
        self._write(ERROR, text)

    def warning(self, text: str) -> None:
        self._write(WARNING, text)

    def info(self, text: str) -> None:
        self._write(INFO, text)

    def _write(self, priority: int, text: str) -> None:
        line = fit(text, LINE_MAX)
        if self._kmsg >= 0:
            _write_all(self._kmsg, f"<{priority}>vshd: {line}\n")
        if self._syslog >= 0:
            _write_all(self._syslog, f"<{priority | FACILITY_DAEMON}>vshd[{os.getpid()}]: {line}")
        if self._stderr:
            _write_all(2, f"vshd: {line}\n")


class Throttle:
    """Warnings that strangers can cause at will: it logs one line in a while, which counts the others.

    A flood of lines pushes other lines out of the kernel's log, and costs the daemon a write each time.
    """

    __slots__ = ("_held", "_log", "_next_s")

    def __init__(self, log: Log) -> None:
        self._log = log
        self._held = 0
        self._next_s = 0.0

    def warning(self, text: str, now_s: float) -> None:
        """now_s: time.monotonic()."""
        if now_s < self._next_s:
            self._held += 1
            return
        more = f" ({self._held} more like it since the last such line)" if self._held else ""
        self._log.warning(text + more)
        self._held = 0
        self._next_s = now_s + THROTTLE_S


def printable(text: str) -> str:
    """Returns `text` on one line, so that a client's words cannot forge another line.

    ascii() is part of the interpreter. A codec such as unicode_escape is a module, which a small guest may not have.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fit(text: str, limit: int) -> str:
    """Makes `text` printable and cuts it to `limit` bytes."""
    # A character takes a byte at least: what is cut off here would not have fitted.
    line = printable(text[:limit]).encode("utf-8", "replace")
    return line[:limit].decode("utf-8", "ignore")


def _write_all(fd: int, text: str) -> None:
    try:
        os.write(fd, text.encode("utf-8", "replace"))
    except OSError:
        pass


def _open_syslog() -> int:
    if not os.path.exists("/dev/log"):
        return -1
    import _socket  # noqa: PLC0415 - few start without /dev/kmsg

    try:
        syslog = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
    except OSError:
        return -1
    try:
        syslog.connect("/dev/log")
    except OSError:
        syslog.close()
        return -1
    return syslog.detach()
