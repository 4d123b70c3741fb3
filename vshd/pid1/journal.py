"""Has the journal of a root's systemd send the guest's log to the collector. Its settings are gone with the boot.

A journal of systemd 256 and later connects to a socket, and sends each record with its unit and its writer
(journald.conf(5), ForwardToSocket). An older one sends lines as to a syslog daemon (ForwardToSyslog), with the writer's
ids as the socket's (SCM_CREDENTIALS, unix(7)). Both sockets are root's alone.
"""

import _socket
import errno
import os

from vshd.root import Root
from vshd.syslog.sockets import open_lines_socket, open_stream_socket

RUN = "/run"
# A name that no unit of systemd has, and the one at which every journal looks for a syslog daemon.
STREAM = "/run/systemd/journal/vmkit"
LINES = "/run/systemd/journal/syslog"
DROP_IN = "/run/systemd/journald.conf.d/vmkit.conf"
TO_STREAM = f"[Journal]\nForwardToSocket={STREAM}\nMaxLevelSocket=debug\n"
TO_LINES = "[Journal]\nForwardToSyslog=yes\nMaxLevelSyslog=debug\n"
PROGRAMS = ("/usr/lib/systemd/systemd-journald", "/lib/systemd/systemd-journald")
# The program has the names of its settings. It has some 200 KB.
SETTING = b"ForwardToSocket"
PROGRAM_MAX = 8 << 20
# Lines that wait in the socket. The journal drops a line for which there is no room. systemd itself sets this later.
QUEUE = "/proc/sys/net/unix/max_dgram_qlen"
QUEUE_LINES = b"512"


def open_journal(root: Root) -> "_socket.socket":
    """A socket at which the root's journal sends all that it gets: a listening one of a stream, or one for lines.

    Raises OSError where /run is no memory: systemd would mount some over it.
    """
    root.enter()
    try:
        if os.stat(RUN).st_dev == os.stat("/").st_dev:
            raise OSError(errno.EXDEV, f"{RUN} is not mounted")
        for path in (STREAM, DROP_IN):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        if _has_setting():
            listening, setting = open_stream_socket(STREAM), TO_STREAM
        else:
            _lengthen_queue()
            listening, setting = open_lines_socket(LINES), TO_LINES
        try:
            _write_setting(setting)
        except BaseException:
            listening.close()
            raise
        return listening
    finally:
        root.leave()


def _has_setting() -> bool:
    for path in PROGRAMS:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            with open(fd, "rb", buffering=0) as program:
                return SETTING in program.read(PROGRAM_MAX)
        except OSError:
            continue
    return False


def _lengthen_queue() -> None:
    try:
        fd = os.open(QUEUE, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, QUEUE_LINES)
    except OSError:
        pass
    finally:
        os.close(fd)


def _write_setting(text: str) -> None:
    fd = os.open(DROP_IN, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
