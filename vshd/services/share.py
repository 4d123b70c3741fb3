"""A folder of the host in this guest (docs/reference/protocol.md 5.6): a file system of FUSE whose requests the host
answers.

Owns /dev/fuse, the mount and the folders made for it. Carries whole messages between the kernel and the connection, and
reads their length alone. When either side ends, so does the mount: programs that use it then get an error.
"""

import errno
import os
import select
import sys

from vshd.root import find_call
from vshd.session.refusal import RefusalError
from vshd.signals import SIGINT, SIGTERM, find_ignored
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Share

DEVICE = "/dev/fuse"
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
# vmkit.shares.fuse: the body of one message, and what is around it.
DATA_MAX = 1 << 20
MESSAGE_MAX = DATA_MAX + 4096
ANSWER_MIN = 16
# Requests that wait together go to the host together, as long as they are small.
TOGETHER_MAX = 1 << 14
# As much as one message: the kernel's own limit, 128 KiB, would take eight messages for it.
READ_AHEAD_KIB = b"%d" % (DATA_MAX >> 10)
PATH_MAX = 4096
ATTEMPTS = 3
# The end of a share that the guest has taken away itself.
UNMOUNTED = "unmounted"


def user_of(_share: "Share") -> bytes:
    """Root, who alone can mount."""
    return b"root"


def describe(share: "Share") -> str:
    """What the log calls it."""
    return os.fsdecode(b"share " + share.path[:PATH_MAX])


def open_service(share: "Share", _fd: int, _around: "Surroundings") -> "Mounted":
    """Mounts the file system. Raises RefusalError, and then nothing has changed."""
    path = os.fsdecode(share.path)
    words = path.split("/")
    if (
        not any(words)
        or len(share.path) >= PATH_MAX
        or words[0]
        or ".." in words
        or "\0" in path
        or b"\0" in share.source
    ):
        raise RefusalError("a share needs an absolute path, without ..", messages.BAD_REQUEST)
    step, device = f"open {DEVICE}", -1
    made: list[str] = []
    try:
        device = _open_device()
        step = f"make the folder {path}"
        _detach_dead(path)
        for attempts_left in range(ATTEMPTS - 1, -1, -1):
            try:
                made += [folder for folder in _make_folders(path) if folder not in made]
                if os.stat(path).st_dev != os.stat(os.path.dirname(path.rstrip("/"))).st_dev:
                    raise RefusalError(f"{path} is a mount point already", messages.BUSY)
                step = f"mount at {path}"
                _mount(share, device)
                break
            except FileNotFoundError:
                # The relay of an earlier share has removed the folder a moment ago.
                if not attempts_left:
                    raise
        _read_ahead(path)
    except OSError as error:
        _clean_up(device, made)
        reason = error.strerror
        if error.errno == errno.ENOENT and step.endswith(DEVICE):
            reason = "this guest's kernel has no FUSE"
        raise RefusalError(f"cannot {step}: {reason}", messages.OTHER, error=error.errno or 0) from error
    except RefusalError:
        _clean_up(device, made)
        raise
    return Mounted(device, share.path, made)


def _open_device() -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(DEVICE, flags)
    except FileNotFoundError:
        # A module, in some kernels.
        try:
            pid = os.posix_spawnp("modprobe", ["modprobe", "fuse"], os.environ, setsigdef=find_ignored())
        except OSError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        os.waitpid(pid, 0)
        return os.open(DEVICE, flags)


def _detach_dead(path: str) -> None:
    """Takes away what a relay that was killed has left: a mount that answers nothing but errors."""
    try:
        # The relay must answer this one. The kernel answers a stat from what it remembers of the dead relay's answers.
        os.statvfs(path)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            return
        _detach(os.fsencode(path))


def _detach(path: bytes) -> None:
    try:
        find_call("umount2")(path, MNT_DETACH | UMOUNT_NOFOLLOW)
    except OSError:
        # It was taken away meanwhile.
        pass


def _make_folders(path: str) -> "list[str]":
    """Makes a folder and those above it; returns the ones that were missing, the uppermost first. Raises OSError."""
    made: list[str] = []
    end = 0
    while end < len(path):
        end = path.find("/", end + 1)
        end = len(path) if end < 0 else end
        try:
            os.mkdir(path[:end], 0o755)
        except FileExistsError:
            continue
        except OSError:
            _clean_up(-1, made)
            raise
        made.append(path[:end])
    return made


def _mount(share: "Share", device: int) -> None:
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if share.read_only else 0)
    # The kernel itself compares users and modes, as on a disk.
    words = (f"fd={device}", "rootmode=40000", "user_id=0", "group_id=0", "allow_other", "default_permissions")
    options = ",".join((*words, f"max_read={DATA_MAX}"))
    find_call("mount")(share.source or b"vmkit", share.path, b"fuse.vmkit", flags, options.encode())


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


def _clean_up(device: int, made: "list[str]") -> None:
    """Closes the device, and removes the folders that were made, as far as they are empty."""
    if device >= 0:
        os.close(device)
    for folder in reversed(made):
        try:
            os.rmdir(folder)
        except OSError:
            return


class Mounted:
    """Invariant: of what came from either side, no message is carried twice, and none in part to the kernel."""

    description = b"fuse"

    def __init__(self, device: int, path: bytes, made: "list[str]") -> None:
        self._device = device
        self._path = path
        self._made = made
        # Of the host's answers; between two turns no whole one.
        self._answers = memoryview(bytearray(2 * MESSAGE_MAX))
        self._end = 0
        # The kernel wants room for the largest request at each read.
        self._requests = memoryview(bytearray(TOGETHER_MAX + MESSAGE_MAX))
        # What the connection did not take of the last requests.
        self._left = self._requests[:0]

    def run(self, fd: int, rest: bytes, wakeup: "Wakeup", _log: "Log") -> str:
        """Carries until the guest unmounts, the host leaves, or vshd ends."""
        self._answers[: len(rest)] = rest
        self._end = len(rest)
        end = "broken"
        try:
            end = self._carry(fd, wakeup)
        except OSError as error:
            end = f"broken: {error.strerror}"
        finally:
            # The kernel answers all that waits with an error, before anything else is done.
            os.close(self._device)
            if end != UNMOUNTED:
                _detach(self._path)
            _clean_up(-1, self._made)
            os.close(fd)
        return end

    def _carry(self, fd: int, wakeup: "Wakeup") -> str:
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
