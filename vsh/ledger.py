"""Records a terminal's attributes before the first of our clients made it raw, and which clients need it raw.

A client that starts beside another one finds the terminal raw already, and cannot read the original attributes. So the
clients of a user share one record per terminal, a small file below the runtime directory:

    original 17664 5 191 35387 15 15 3 28 127 21 ...
    raw 17408 4 191 2608 15 15 3 28 127 21 ...
    user 4711 8812345
    end

The numbers are those of tcgetattr(3), with the control characters behind them. A user is a process with its start time.
Clients read and write the file under its lock, and remove it when they restore the terminal. The next client also uses
a record that outlived its users, for as long as the terminal has the record's raw attributes.
"""

import fcntl
import os
import time

from vsh import registry, signals
from vsh.attributes import Attributes, is_canonical, make_raw, read_attributes, write_attributes
from vsh.errors import VshError
from vsh.stdio import is_background

FOLDER = "terminals"
# Documentation/admin-guide/devices.txt: /dev/tty, another name of the process's own terminal.
DEV_TTY = os.makedev(5, 0)
# The lock is held for less than a millisecond, unless its holder was stopped in between. Without it there is no record.
LOCK_TRIES = 100
LOCK_PAUSE_S = 0.01
# A record has two lines of 38 numbers, and one per client.
SIZE_MAX = 16384
# proc(5), /proc/PID/stat, counted behind the name: state, pgrp, tty_nr, tpgid, starttime.
STATE, GROUP, TERMINAL, FOREGROUND, START = 0, 2, 4, 5, 19
STOPPED, ENDED = "Tt", "ZXx"

User = tuple[int, int]


class TerminalRecord:
    """original: the terminal's first attributes; raw: those that replaced them; users: processes that need it raw."""

    __slots__ = ("original", "raw", "users")

    def __init__(self, original: Attributes, raw: Attributes, users: list[User]) -> None:
        self.original = original
        self.raw = raw
        self.users = users

    def render(self) -> bytes:
        lines = [" ".join(["original", *map(str, self.original)]), " ".join(["raw", *map(str, self.raw)])]
        lines += [f"user {pid} {start}" for pid, start in self.users]
        return "\n".join([*lines, "end\n"]).encode()


class Ledger:
    """One process's use of the record of the terminal at `fd`. Invariant: `_own` is its last entry, if any.

    All signals wait while the terminal and its record change together.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._path = ""
        self._device = 0
        self._user = (0, 0)
        self._own: TerminalRecord | None = None

    def enter(self) -> bool:
        """Makes the terminal raw for this process; False when there is no terminal."""
        if read_attributes(self._fd) is None:
            return False
        before = signals.block_all()
        file = -1
        try:
            self._find()
            file = _open_locked(self._path, os.O_CREAT)
            return self._enter(file)
        finally:
            _close(file)
            signals.restore_mask(before)

    def leave(self, *, is_guardian: bool = False) -> None:
        """Restores the terminal, unless another client needs it raw at this moment.

        is_guardian: the caller acts for the process that entered, which has died.
        """
        if self._own is None:
            return
        before = signals.block_all()
        own, self._own = self._own, None
        file = _open_locked(self._path)
        try:
            record = _read(file) or own
            if not is_canonical(record.original) and is_canonical(own.original):
                # The record was lost while we were here, and a client came that found the terminal raw.
                record.original = own.original
            self._leave(file, record, is_guardian)
        finally:
            _close(file)
            signals.restore_mask(before)

    def _enter(self, file: int) -> bool:
        now = read_attributes(self._fd)
        if now is None:
            return False
        record = _read(file)
        users = [] if record is None else [user for user in record.users if _is_alive(user)]
        if record is None or not (now == record.raw or (users and not is_canonical(now))):
            # The terminal is not raw, or not by a client: this is the original.
            record = TerminalRecord(now, make_raw(now), [])
        record.users = [*(user for user in users if user != self._user), self._user]
        self._own = record
        # The record comes first: a client that is killed here has changed nothing yet.
        _write(file, record)
        write_attributes(self._fd, record.raw)
        got = read_attributes(self._fd)
        if got is not None and got != record.raw:
            # Some devices have no 8 bits.
            record.raw = got
            _write(file, record)
        return True

    def _leave(self, file: int, record: TerminalRecord, is_guardian: bool) -> None:
        others = [user for user in record.users if user != self._user and _is_alive(user)]
        if any(self._is_at_work(user) for user in others):
            record.users = others
            _write(file, record)
            return
        is_in_front = not is_guardian and not is_background(self._fd)
        # Another job that has the terminal now may have set it for itself.
        if is_in_front or read_attributes(self._fd) == record.raw:
            write_attributes(self._fd, record.original)
        if file >= 0:
            try:
                os.unlink(self._path)
            except OSError:
                # The folder is gone: it ends with the user's last login.
                pass

    def _is_at_work(self, user: User) -> bool:
        """Whether a user runs in this terminal's foreground. One in the background makes it raw when it comes back."""
        fields = _read_stat(user[0])
        if not fields or fields[STATE] in STOPPED:
            return False
        return fields[GROUP] == fields[FOREGROUND] or int(fields[TERMINAL]) != self._device

    def _find(self) -> None:
        """Finds this process's entry and the record's path. Without a path, each client works alone."""
        if self._user[0]:
            return
        pid = os.getpid()
        fields = _read_stat(pid)
        if not fields:
            return
        self._user = (pid, int(fields[START]))
        device = os.fstat(self._fd).st_rdev
        self._device = int(fields[TERMINAL]) if device == DEV_TTY else device
        try:
            # Containers may share the folder, and have a /dev/pts each.
            self._path = os.path.join(_open_folder(), f"{os.stat('/dev/pts').st_dev:x}-{self._device:x}")
        except (VshError, OSError):
            pass


def _open_folder() -> str:
    runtime = registry.find_runtime_directory()
    if not os.path.isdir(runtime):
        _make_folder(runtime)
        # Another user may have been faster.
        registry.find_runtime_directory()
    folder = os.path.join(runtime, FOLDER)
    _make_folder(folder)
    return folder


def _make_folder(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass


def _open_locked(path: str, flags: int = 0) -> int:
    """Opens and locks the file; closing it unlocks it. -1: there is no file, or another process keeps the lock."""
    for _ in range(LOCK_TRIES):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        except OSError:
            return -1
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            time.sleep(LOCK_PAUSE_S)
            continue
        if os.fstat(file).st_nlink:
            return file
        # Removed while we waited.
        os.close(file)
    return -1


def _close(file: int) -> None:
    if file >= 0:
        os.close(file)


def _read(file: int) -> TerminalRecord | None:
    """Reads the record; None when there is no whole record."""
    if file < 0:
        return None
    parts: dict[str, list[list[int]]] = {}
    try:
        for line in os.pread(file, SIZE_MAX, 0).decode().splitlines():
            word, *numbers = line.split()
            if word == "end":
                (original,), (raw,) = parts["original"], parts["raw"]
                if len(original) != len(raw):
                    return None
                return TerminalRecord(original, raw, [(pid, start) for pid, start in parts.get("user", [])])
            parts.setdefault(word, []).append([int(number) for number in numbers])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _write(file: int, record: TerminalRecord) -> None:
    """Writes the record. On a full disk it leaves no whole record."""
    if file < 0:
        return
    data = record.render()
    try:
        os.pwrite(file, data, 0)
        os.ftruncate(file, len(data))
    except OSError:
        pass


def _read_stat(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return []


def _is_alive(user: User) -> bool:
    fields = _read_stat(user[0])
    return bool(fields) and int(fields[START]) == user[1] and fields[STATE] not in ENDED
