"""What maitred does to its guest: mounts, the clock, the time zone, users, the way down. Needs root.

Functions that may wait are called in a thread. Knows nothing of gRPC.
"""

import contextlib
import ctypes
import errno
import os
import re
import signal
import stat
import subprocess
import time

from vshd.carry import vsock

# linux/mount.h
MS_NOSUID, MS_NODEV, MS_BIND = 2, 4, 4096
OPTIONS_9P = "trans=fd,rfdno={0},wfdno={0},cache=none,access=any,version=9p2000.L"
STATEFUL = "/mnt/stateful"
ZONES = "/usr/share/zoneinfo"
LOCALTIME = "/etc/localtime"
SYSTEMD = "/run/systemd/system"
# systemd's signal for poweroff.target, and vshd's own init's and busybox's.
SYSTEMD_POWER_OFF = signal.SIGRTMIN + 4
INIT_POWER_OFF = signal.SIGUSR2
USER_NAME = re.compile(rb"[a-z][-a-z0-9_]*\$?")
USER_NAME_BYTES_MAX = 32
DEFAULT_UID = 1000
UID_MAX = 0xFFFFFFFE
SHELL = b"/bin/bash"
# useradd copies a skeleton, and makes a file system of a small disk; under emulation too.
PROGRAM_TIMEOUT_S = 60.0
# Of what a program complains of, for the answer.
COMPLAINT_BYTES_MAX = 512


class BadRequestError(Exception):
    """The request has a wrong form, and nothing was done; for the method's INVALID_ARGUMENT."""


class BrokenError(Exception):
    """The guest could not do it; for the method's INTERNAL."""


class System:
    """The guest that this process runs in. Tests have another."""

    def mount(self, source: bytes, target: bytes, fstype: bytes, flags: int, options: bytes) -> int:
        """mount(2); its errno, or 0."""
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mount(source or None, target, fstype or None, ctypes.c_ulong(flags), options or None)
        return ctypes.get_errno() if done else 0

    def unmount(self, target: bytes) -> int:
        """umount(2); its errno, or 0."""
        libc = ctypes.CDLL(None, use_errno=True)
        return ctypes.get_errno() if libc.umount2(target, 0) else 0

    def connect_host(self, port: int) -> int:
        """A connection to a vsock port of the host: a descriptor. Raises VsockError."""
        return vsock.connect(vsock.HOST_CID, port).detach()

    def set_time(self, nanoseconds: int) -> None:
        """Raises OSError."""
        time.clock_settime_ns(time.CLOCK_REALTIME, nanoseconds)

    def run(self, argv: list[bytes]) -> tuple[int, str]:
        """Runs a program; its status, and what it complained of. 127 where it is missing."""
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                timeout=PROGRAM_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            return 127, f"the guest has no {argv[0].decode()}"
        except subprocess.TimeoutExpired:
            return 1, f"{argv[0].decode()} took longer than {PROGRAM_TIMEOUT_S:.0f} s"
        return done.returncode, done.stderr[:COMPLAINT_BYTES_MAX].decode(errors="replace").strip()

    def read(self, path: str) -> bytes:
        """A file of users or groups. Raises OSError."""
        with open(path, "rb") as file:
            return file.read()

    def power_off(self) -> None:
        """Asks pid 1. Raises OSError."""
        os.kill(1, SYSTEMD_POWER_OFF if self.has_systemd() else INIT_POWER_OFF)

    def has_systemd(self) -> bool:
        """Whether systemd is pid 1 (sd_booted(3))."""
        return os.path.isdir(SYSTEMD)

    def find_space(self) -> int:
        """Bytes that root can still write."""
        found = os.statvfs(STATEFUL if os.path.ismount(STATEFUL) else "/")
        return found.f_bavail * found.f_frsize


def mount(
    system: System,
    source: bytes,
    target: bytes,
    fstype: bytes,
    flags: int,
    options: bytes,
    *,
    create_target: bool = False,
    permissions: int = 0,
    mkfs_if_needed: bool = False,
) -> int:
    """Mounts; the errno that mount(2) gave, or 0. Raises BadRequestError, BrokenError."""
    if b"\0" in source + target + fstype + options:
        raise BadRequestError("a path or an option has a NUL byte")
    if not target:
        raise BadRequestError("missing target")
    if permissions & ~0o7777:
        raise BadRequestError(f"permissions {permissions:#o} are not those of a file")
    if create_target:
        _make_folder(target)
    error = system.mount(source, target, fstype, flags, options)
    if error == errno.EINVAL and mkfs_if_needed and _make_btrfs(system, source):
        error = system.mount(source, target, fstype, flags, options)
    if not error and permissions:
        try:
            os.chmod(target, permissions)
        except OSError as failure:
            system.unmount(target)
            raise BrokenError(f"cannot change the permissions: {failure.strerror}") from failure
    return error


def mount_9p(system: System, port: int, target: bytes) -> int:
    """Mounts what a 9P server of the host has; an errno, or 0. Raises BadRequestError, BrokenError."""
    if not 0 < port < vsock.ANY:
        raise BadRequestError(f"port must be between 1 and {vsock.ANY - 1}, not {port}")
    if not target or b"\0" in target:
        raise BadRequestError("missing target, or it has a NUL byte")
    try:
        fd = system.connect_host(port)
    except vsock.VsockError as error:
        raise BrokenError(str(error)) from error
    try:
        _make_folder(target)
        # The kernel keeps the connection itself.
        return system.mount(b"9p", target, b"9p", MS_NOSUID | MS_NODEV, OPTIONS_9P.format(fd).encode())
    finally:
        os.close(fd)


def _make_folder(target: bytes) -> None:
    try:
        os.makedirs(target, 0o755, exist_ok=True)
    except OSError as error:
        raise BrokenError(f"cannot make {os.fsdecode(target)}: {error.strerror}") from error


def _make_btrfs(system: System, source: bytes) -> bool:
    # It refuses a disk that has a file system.
    return system.run([b"mkfs.btrfs", b"--", source])[0] == 0


def set_time(system: System, seconds: int, nanos: int) -> None:
    """Sets the clock. Raises BadRequestError, BrokenError."""
    if not 0 < seconds < 1 << 63:
        raise BadRequestError("seconds must be above 0")
    if not 0 <= nanos < 1_000_000_000:
        raise BadRequestError(f"nanos must be between 0 and 999999999, not {nanos}")
    try:
        system.set_time(seconds * 1_000_000_000 + nanos)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the clock has no such time"
        raise BrokenError(f"cannot set the clock: {reason}") from error


def set_timezone(
    system: System, name: bytes, *, use_bind_mount: bool, zones: str = ZONES, localtime: str = LOCALTIME
) -> None:
    """Makes a zone the guest's. Raises BadRequestError, BrokenError."""
    parts = os.fsdecode(name).split("/")
    if {"", ".", ".."} & set(parts) or "\0" in parts[-1]:
        raise BadRequestError("a time zone is a name such as Europe/Berlin")
    path = "/".join((zones, *parts))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileNotFoundError
    except (OSError, ValueError) as error:
        raise BadRequestError(f"the guest has no time zone {os.fsdecode(name)}") from error
    if use_bind_mount:
        system.unmount(os.fsencode(localtime))
        error_number = system.mount(os.fsencode(path), os.fsencode(localtime), b"", MS_BIND, b"")
        if error_number:
            raise BrokenError(f"cannot mount {path}: {os.strerror(error_number)}")
        return
    try:
        # A rest of a process that was killed here.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{localtime}.new")
        os.symlink(path, f"{localtime}.new")
        os.rename(f"{localtime}.new", localtime)
    except OSError as error:
        raise BrokenError(f"cannot change {localtime}: {error.strerror}") from error


def set_up_user(system: System, name: bytes, uid: int, groups: list[bytes]) -> tuple[str, bytes]:
    """Makes a user, or adds groups to one; what is wrong, or "", and the user's name, or whose uid it is.

    Raises BadRequestError, BrokenError.
    """
    if not USER_NAME.fullmatch(name) or len(name) > USER_NAME_BYTES_MAX:
        raise BadRequestError("username must match [a-z][-a-z0-9_]*\\$? and have at most 32 bytes")
    if not 0 < uid <= UID_MAX:
        raise BadRequestError(f"uid must be between 1 and {UID_MAX}, not {uid}")
    users = _read_names(system, "/etc/passwd")
    known = _read_names(system, "/etc/group")
    for group in groups:
        if group not in known:
            raise BadRequestError(f"the guest has no group {group.decode(errors='replace')}")
    owners = [other for other, number in users.items() if number == uid]
    if owners and name not in owners:
        return f"uid {uid} is that of another user", owners[0]
    if name in users and users[name] != uid:
        return f"the user has the uid {users[name]}", name
    status, complaint = 0, ""
    if name not in users:
        more = [b"--groups", b",".join(groups)] if groups else []
        argv = [b"useradd", b"--uid", b"%d" % uid, b"--create-home", b"--shell", SHELL, *more, name]
        status, complaint = system.run(argv)
    elif groups:
        status, complaint = system.run([b"usermod", b"--append", b"--groups", b",".join(groups), name])
    if not status and system.has_systemd():
        status, complaint = system.run([b"loginctl", b"enable-linger", name])
    if status:
        raise BrokenError(complaint or f"the program for users ended with {status}")
    return "", name


def _read_names(system: System, path: str) -> dict[bytes, int]:
    """The names and numbers of a file such as /etc/passwd. Raises BrokenError."""
    try:
        lines = system.read(path).split(b"\n")
    except OSError as error:
        raise BrokenError(f"cannot read {path}: {error.strerror}") from error
    fields = [line.split(b":") for line in lines]
    return {words[0]: int(words[2]) for words in fields if len(words) > 2 and words[2].isdigit()}
