"""A shared folder by FUSE (docs/reference/protocol.md 5.6): the guest's kernel asks, and the host answers.

Owns /dev/fuse. Carries whole messages between the kernel and the connection, and reads their length alone.
"""

import errno
import os
import select
import sys

from vshd.root import find_call
from vshd.services.share import MS_NODEV, MS_NOSUID, MS_RDONLY, UNMOUNTED, load_module, refuse_way
from vshd.signals import SIGINT, SIGTERM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.signals import Wakeup
    from vshd.wire.requests import Share

DEVICE = "/dev/fuse"
# vmkit.shares.fuse: the body of one message, and what is around it.
DATA_MAX = 1 << 20
MESSAGE_MAX = DATA_MAX + 4096
ANSWER_MIN = 16
# Requests that wait together go to the host together, as long as they are small.
TOGETHER_MAX = 1 << 14
# As much as one message: the kernel's own limit, 128 KiB, would take eight messages for it.
READ_AHEAD_KIB = b"%d" % (DATA_MAX >> 10)


def prepare() -> "FuseWay":
    """Opens the device. Raises RefusalError where this guest's kernel has none."""
    try:
        return FuseWay(_open_device())
    except OSError as error:
        lacks = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        reason = "this guest's kernel has no FUSE" if lacks else error.strerror
        raise refuse_way(f"cannot open {DEVICE}: {reason}", error) from error


def _open_device() -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(DEVICE, flags)
    except FileNotFoundError:
        # A module, in some kernels.
        load_module("fuse")
        return os.open(DEVICE, flags)


def _read_ahead(path: str) -> None:
    """Has the kernel read large files in large pieces, where /proc and /sys are there to tell it so."""
    try:
        # It asks nothing of the file system, which the host does not serve yet.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mount = _find_words(f"/proc/self/fdinfo/{place}", b"mnt_id:")[1]
        finally:
            os.close(place)
        device = _find_words("/proc/self/mountinfo", mount)[2]
        knob = os.open(b"/sys/class/bdi/%s/read_ahead_kb" % device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(knob, READ_AHEAD_KIB)
        finally:
            os.close(knob)
    except (OSError, LookupError):
        pass


def _find_words(path: str, word: bytes) -> "list[bytes]":
    """The words of a file's first line that begins with `word`. Raises OSError, LookupError."""
    with open(path, "rb") as file:
        for line in file:
            words = line.split()
            if words[:1] == [word]:
                return words
    raise LookupError(path)


class FuseWay:
    """Invariant: of what came from either side, no message is carried twice, and none in part to the kernel."""

    description = b"fuse"

    def __init__(self, device: int) -> None:
        self._device = device
        # Of the host's answers; between two turns no whole one.
        self._answers = memoryview(bytearray(2 * MESSAGE_MAX))
        self._end = 0
        # The kernel wants room for the largest request at each read.
        self._requests = memoryview(bytearray(TOGETHER_MAX + MESSAGE_MAX))
        # What the connection did not take of the last requests.
        self._left = self._requests[:0]

    def mount(self, share: "Share") -> None:
        """Raises OSError."""
        flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if share.read_only else 0)
        # The kernel itself compares users and modes, as on a disk.
        words = (f"fd={self._device}", "rootmode=40000", "user_id=0", "group_id=0", "allow_other")
        options = ",".join((*words, "default_permissions", f"max_read={DATA_MAX}"))
        find_call("mount")(share.source or b"vmkit", share.path, b"fuse.vmkit", flags, options.encode())
        _read_ahead(os.fsdecode(share.path))

    def close(self) -> None:
        """The kernel answers all that waits with an error."""
        os.close(self._device)

    def serve(self, fd: int, rest: bytes, wakeup: "Wakeup") -> str:
        """Carries until the guest unmounts, the host leaves, or vshd ends. Raises OSError."""
        self._answers[: len(rest)] = rest
        self._end = len(rest)
        # One turn is one message, mostly: under emulation each call more is a tenth of a small file's time.
        poll = select.poll()
        poll.register(wakeup.fd, select.POLLIN)
        was_held = None
        while True:
            is_held = bool(self._left)
            if is_held != was_held:
                was_held = is_held
                poll.register(fd, select.POLLIN | (select.POLLOUT if is_held else 0))
                poll.register(self._device, 0 if is_held else select.POLLIN)
            for ready, events in poll.poll():
                if ready == wakeup.fd:
                    numbers = wakeup.take()
                    if SIGTERM in numbers or SIGINT in numbers:
                        return "vshd is shutting down"
                elif ready == fd:
                    if events & select.POLLOUT:
                        self._send(fd)
                    if events & ~select.POLLOUT and not self._receive(fd):
                        return "closed"
                elif not self._read(fd):
                    return UNMOUNTED

    def _read(self, fd: int) -> bool:
        """Sends the kernel's requests to the host; False once there is no mount any more. Raises OSError."""
        end = 0
        while end <= TOGETHER_MAX:
            try:
                size = os.readv(self._device, [self._requests[end:]])
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENOENT:
                    # The request was taken back meanwhile.
                    continue
                if error.errno == errno.ENODEV:
                    return False
                raise
            if not size:
                return False
            end += size
        if end:
            self._left = self._requests[:end]
            self._send(fd)
        return True

    def _send(self, fd: int) -> None:
        try:
            self._left = self._left[os.write(fd, self._left) :]
        except BlockingIOError:
            pass

    def _receive(self, fd: int) -> bool:
        """Gives the host's answers to the kernel; False at the end of the connection. Raises OSError."""
        try:
            size = os.readv(fd, [self._answers[self._end :]])
        except BlockingIOError:
            return True
        if not size:
            return False
        self._end += size
        start = 0
        while self._end - start >= ANSWER_MIN:
            length = int.from_bytes(self._answers[start : start + 4], sys.byteorder)
            if not ANSWER_MIN <= length <= MESSAGE_MAX:
                raise OSError(errno.EPROTO, f"the host's answer has {length} bytes")
            if self._end - start < length:
                break
            try:
                os.write(self._device, self._answers[start : start + length])
            except FileNotFoundError:
                # The kernel has taken the request back.
                pass
            start += length
        waiting = self._end - start
        if start and waiting:
            # Through a copy: the two places may overlap.
            self._answers[:waiting] = bytes(self._answers[start : self._end])
        self._end = waiting
        return True
