"""A shared folder by 9P (docs/reference/protocol.md 5.6): the guest's kernel speaks with the host over the connection.

Carries nothing: the kernel has the connection's descriptor (trans=fd). Looks for the end of either side alone.
"""

import _socket
import errno
import os
import select
import struct

from vshd.root import find_call
from vshd.services.share import (
    ATTEMPTS,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    UNMOUNTED,
    load_module,
    make_folders,
    refuse_way,
)
from vshd.signals import SIGINT, SIGTERM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.signals import Wakeup
    from vshd.wire.requests import Share

MODULES = ("9p", "9pnet_fd")
TYPE = b"9p"
# All users of the guest are one user of the host. The kernel compares users and modes itself, keeps nothing of what the
# host may change, and asks for no extended attributes. Kernels before Linux 6.1 keep two buffers of MSIZE for each
# request.
OPTIONS = b"trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,msize=%d,access=any,cache=none,noxattr"
MSIZE = 1 << 17
# linux/inotify.h
IN_DELETE_SELF, IN_UNMOUNT, IN_IGNORED, IN_ONLYDIR = 0x400, 0x2000, 0x8000, 0x0100_0000
EVENT = struct.Struct("iIII")
EVENTS_MAX = 4096
# vmkit.ninep.messages: Rlerror with NOTAG.
FAILED = struct.Struct("<IBHI")
RLERROR, NO_TAG = 7, 0xFFFF
# poll(2): the host has closed its direction. Python has the number since 3.13 alone.
POLLRDHUP = 0x2000


def prepare() -> "NineWay":
    """Raises RefusalError where this guest's kernel has no 9P, as far as that can be seen before."""
    if not _has_type():
        load_module(*MODULES)
        if not _has_type():
            raise refuse_way("this guest's kernel has no 9P", OSError(errno.ENODEV, ""))
    elif not os.path.exists(f"/sys/module/{MODULES[1]}"):
        load_module(*MODULES)
    try:
        return NineWay(watch_nothing())
    except OSError as error:
        raise refuse_way(f"cannot watch a mount by inotify: {error.strerror}", error) from error


def _has_type() -> bool:
    """Whether the kernel has the file system; where /proc does not show it, mount(2) may."""
    try:
        with open("/proc/filesystems", "rb") as file:
            return any(line.split()[-1:] == [TYPE] for line in file)
    except OSError:
        return True


def watch_nothing() -> int:
    """An inotify instance. Raises OSError."""
    return _call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)


def _call(name: str, *words: "int | bytes") -> int:
    """A function of the C library that returns a number. Raises OSError."""
    try:
        import ctypes  # noqa: PLC0415 - a guest whose Python lacks it has other ways
    except ImportError as error:
        raise OSError(errno.ENOSYS, "this Python has no ctypes") from error
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class NineWay:
    """Invariant: `_watch` is an inotify instance, in which the mount is, once there is one."""

    description = TYPE

    def __init__(self, watch: int) -> None:
        self._watch = watch
        self._fd = -1
        self._share: Share | None = None

    def mount(self, share: "Share") -> None:
        """Later, in serve(): mount(2) itself asks the host, which answers once the client was told READY."""
        self._share = share

    def serve(self, fd: int, rest: bytes, wakeup: "Wakeup") -> str:
        """Serves until the guest unmounts, the host leaves, or vshd ends. Raises OSError."""
        share = self._share
        assert share is not None, "open_service() has called mount()"
        if rest:
            raise OSError(errno.EPROTO, "the host spoke before the kernel")
        self._fd = fd
        try:
            self._mount(share, fd)
        except OSError as error:
            os.write(fd, FAILED.pack(FAILED.size, RLERROR, NO_TAG, error.errno or errno.EIO))
            return f"cannot mount: {error.strerror}"
        self.watch(share.path)
        # By this request, which is none of mount(2)'s own, the host knows that the folder has its place.
        os.statvfs(share.path)
        return self.await_end(fd, wakeup)

    def _mount(self, share: "Share", fd: int) -> None:
        flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if share.read_only else 0)
        for attempts_left in range(ATTEMPTS - 1, -1, -1):
            try:
                find_call("mount")(share.source or b"vmkit", share.path, TYPE, flags, OPTIONS % (fd, fd, MSIZE))
                return
            except FileNotFoundError:
                # An earlier share has removed the folder a moment ago.
                if not attempts_left:
                    raise
                make_folders(os.fsdecode(share.path))

    def watch(self, path: bytes) -> None:
        """Has the end of the file system that is mounted there end the share. Raises OSError."""
        _call("inotify_add_watch", self._watch, path, IN_DELETE_SELF | IN_ONLYDIR)

    def await_end(self, fd: int, wakeup: "Wakeup") -> str:
        """Waits until the guest unmounts, the host leaves, or vshd ends; the end in words."""
        poll = select.poll()
        poll.register(wakeup.fd, select.POLLIN)
        poll.register(self._watch, select.POLLIN)
        # What can be read is the kernel's.
        poll.register(fd, POLLRDHUP)
        while True:
            for ready, _ in poll.poll():
                if ready == wakeup.fd:
                    numbers = wakeup.take()
                    if SIGTERM in numbers or SIGINT in numbers:
                        return "vshd is shutting down"
                elif ready == fd:
                    return "closed"
                elif self._is_unmounted():
                    return UNMOUNTED

    def _is_unmounted(self) -> bool:
        """Whether the last mount of this file system is gone, in every namespace, and the last file closed."""
        events = os.read(self._watch, EVENTS_MAX)
        start = 0
        while start < len(events):
            _, mask, _, size = EVENT.unpack_from(events, start)
            if mask & (IN_UNMOUNT | IN_IGNORED):
                return True
            start += EVENT.size + size
        return False

    def close(self) -> None:
        """The kernel reads the end of the connection, and answers all that waits with an error."""
        os.close(self._watch)
        if self._fd >= 0:
            connection = _socket.socket(fileno=self._fd)
            try:
                connection.shutdown(_socket.SHUT_RD)
            except OSError:
                # The host was faster.
                pass
            finally:
                connection.detach()
