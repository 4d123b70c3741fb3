"""A shared folder by virtiofs (docs/reference/protocol.md 5.6): the host plugs a device, and this guest mounts its tag.

The kernel's requests do not come by here. The device appears a moment after the host has plugged it, and the kernel
reports it by a uevent (netlink(7)).
"""

import _socket
import errno
import os
import select
import time

from vshd.root import find_call
from vshd.services.share import MS_NODEV, MS_NOSUID, MS_RDONLY, UNMOUNTED, load_module, refuse_way
from vshd.signals import SIGINT, SIGTERM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.signals import Wakeup
    from vshd.wire.requests import Share

TYPE = b"virtiofs"
# linux/netlink.h; the kernel's own events are those of group 1.
NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
EVENT_BYTES = 8192
# A guest on a busy host takes a second. A kernel without hot-plugging of PCI Express never sees it.
DEVICE_DEADLINE_S = 15.0
# Where the event was lost, such as by a full buffer.
LOOK_MS = 500
READ_AHEAD_KIB = b"1024"
MOUNTS = "/proc/self/mountinfo"


def prepare() -> "VirtiofsWay":
    """Raises RefusalError where this guest's kernel has no virtiofs."""
    if not _has_type():
        load_module("virtiofs")
    if not _has_type():
        raise refuse_way("this guest's kernel has no virtiofs", OSError(errno.ENODEV, ""))
    return VirtiofsWay()


def _has_type() -> bool:
    try:
        with open("/proc/filesystems", "rb") as file:
            return any(line.split()[-1:] == [TYPE] for line in file)
    except OSError:
        # mount(2) will say.
        return True


def _find_line(path: str, word: bytes) -> "list[bytes]":
    """The words of a file's first line that begins with `word`; empty where there is none. Raises OSError."""
    with open(path, "rb") as file:
        for line in file:
            words = line.split()
            if words[:1] == [word]:
                return words
    return []


class VirtiofsWay:
    """Owns the mount's number in the kernel's list."""

    description = b"virtiofs"

    def __init__(self) -> None:
        self._mount = b""

    def mount(self, share: "Share") -> None:
        """Waits for the device of the tag `share.source`. Raises OSError, and RefusalError where it does not appear."""
        flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if share.read_only else 0)
        deadline_s = time.monotonic() + DEVICE_DEADLINE_S
        events = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
        try:
            # Bound before the first look, so that no event comes between.
            events.bind((0, KERNEL_GROUP))
            poll = select.poll()
            poll.register(events.fileno(), select.POLLIN)
            while True:
                try:
                    find_call("mount")(share.source, share.path, TYPE, flags, b"")
                    break
                except OSError as error:
                    # The kernel knows no such tag.
                    if error.errno != errno.EINVAL:
                        raise
                    if time.monotonic() >= deadline_s:
                        raise refuse_way("this guest's kernel does not see the device", error) from error
                if poll.poll(LOOK_MS):
                    try:
                        events.recv(EVENT_BYTES)
                    except OSError as error:
                        if error.errno != errno.ENOBUFS:
                            raise
        finally:
            events.close()
        self._note_mount(os.fsdecode(share.path))

    def _note_mount(self, path: str) -> None:
        """Remembers the mount, and has the kernel read large files in large pieces, where /proc and /sys are there."""
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                number = _find_line(f"/proc/self/fdinfo/{place}", b"mnt_id:")[1]
            finally:
                os.close(place)
            device = _find_line(MOUNTS, number)[2]
            self._mount = number
            knob = os.open(b"/sys/class/bdi/%s/read_ahead_kb" % device, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(knob, READ_AHEAD_KIB)
            finally:
                os.close(knob)
        except (OSError, LookupError):
            pass

    def close(self) -> None:
        """The host answers all that waits with an error."""

    def serve(self, fd: int, _rest: bytes, wakeup: "Wakeup") -> str:
        """Waits until the guest unmounts, the host leaves, or vshd ends. Raises OSError."""
        poll = select.poll()
        poll.register(wakeup.fd, select.POLLIN)
        poll.register(fd, select.POLLIN)
        mounts = -1
        if self._mount:
            mounts = os.open(MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
            # The kernel reports a change of the list.
            poll.register(mounts, select.POLLPRI)
        try:
            while True:
                if self._mount and not _find_line(MOUNTS, self._mount):
                    return UNMOUNTED
                for ready, _ in poll.poll():
                    if ready == wakeup.fd:
                        numbers = wakeup.take()
                        if SIGTERM in numbers or SIGINT in numbers:
                            return "vshd is shutting down"
                    elif ready == fd and not os.read(fd, EVENT_BYTES):
                        return "closed"
        finally:
            if mounts >= 0:
                os.close(mounts)
