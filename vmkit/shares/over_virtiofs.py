"""Shares a folder by virtiofs: virtiofsd serves it, and QEMU has a device for it, plugged while the guest runs.

The guest's requests do not come by this process. They go from the guest's memory to virtiofsd, which runs as the
folder's user in a sandbox of its own (vmkit.shares.guard, vmkit.shares.filter).
"""

import contextlib
import json
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vmkit.errors import MachineError
from vmkit.machine.programs import start_program
from vmkit.machine.stop import open_control
from vmkit.machine.virtiofsd import Virtiofsd, find_sharing_virtiofsd
from vmkit.machine.words import PlugFolder, UnplugFolder
from vmkit.shares.connection import PIECE_BYTES, ask_guest, end_connection
from vmkit.shares.filter import has_filter
from vmkit.shares.guard import LISTENER_MARK, WantedServer
from vmkit.shares.place import SharedPlace
from vsh.errors import ExecError
from vsh.registry import Entry, find_machine
from vshd.wire import messages

NAME = "virtiofs"

# virtiofsd's namespaces, on a busy host; and all that it shared given up.
START_DEADLINE_S: Final = 20.0
END_DEADLINE_S: Final = 5.0
# QEMU asks virtiofsd for its features meanwhile.
PLUG_DEADLINE_S: Final = 30.0
MAX_ANSWER_BYTES: Final = 1 << 16
# The largest id is none.
OTHER_IDS: Final = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class _Owner:
    uid: int
    gid: int


def find_owner(folder: int) -> _Owner:
    """Who serves the folder of this descriptor: its user, never root. Raises ExecError."""
    if os.geteuid() != 0:
        return _Owner(os.geteuid(), os.getegid())
    status = os.fstat(folder)
    if status.st_uid == 0:
        raise _refuse("virtiofsd does not run as root, and the folder is root's")
    return _Owner(status.st_uid, status.st_gid)


def has_mount_below(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether something is mounted below a folder; True where this host does not show its mounts."""
    above = path.rstrip("/") + "/"
    try:
        # The fifth word of a line is the place; spaces and the like are octal there.
        with open(mounts, "rb") as file:  # noqa: PTH123
            places = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in file]
    except (OSError, IndexError, UnicodeError):
        return True
    return any(place.startswith(os.fsencode(above)) for place in places)


def plan_argv(found: Virtiofsd, path: str, owner: _Owner, *, is_read_only: bool) -> tuple[str, ...]:
    """virtiofsd's argv. The owner's files are root's in the guest, and all that the guest makes is the owner's."""
    return (
        found.program,
        "--fd", LISTENER_MARK,
        "--shared-dir", path,
        "--sandbox", "namespace",
        "--cache", "auto",
        # It gives requests back in their order: vmkit.shares.rings relies on that.
        "--thread-pool-size", "0",
        "--inode-file-handles=never",
        "--rlimit-nofile", str(found.open_files),
        *_squash("--translate-uid", owner.uid),
        *_squash("--translate-gid", owner.gid),
        *(("--readonly",) if is_read_only else ()),
    )  # fmt: skip


def _squash(option: str, number: int) -> tuple[str, ...]:
    return (option, f"map:0:{number}:1", option, f"squash-guest:1:{number}:{OTHER_IDS}")


def connect(machine: str, place: SharedPlace, folder: int) -> "ConnectedVirtiofs":
    """Plugs the device, and has the guest mount it. folder: an open directory. Raises VshError kinds."""
    owner = find_owner(folder)
    if not has_filter():
        raise _refuse("vmkit has no table of this processor's system calls")
    path = str(Path(f"/proc/self/fd/{folder}").readlink())
    if has_mount_below(path):
        raise _refuse("another file system is mounted below the folder, and would be part of it")
    entry = find_machine(name=machine)
    found = find_sharing_virtiofsd(Path(path), int(str(entry.record.get("memory_mib", 0))) if entry else 0)
    if not found.program:
        raise _refuse(found.trouble)
    tag = f"vmkit-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        if entry is None:
            raise _refuse("the machine has ended")
        wanted = WantedServer(
            plan_argv(found, path, owner, is_read_only=place.read_only),
            f"{entry.directory}/{tag}",
            owner.uid,
            owner.gid,
        )
        guard = stack.enter_context(_plug(entry, wanted, tag))
        fd, _ = ask_guest(machine, place, NAME, source=tag)
        return ConnectedVirtiofs(fd, guard, stack.pop_all())


class ConnectedVirtiofs:
    """A mounted share. Owns the connection to the guest's vshd, and virtiofsd with its device."""

    def __init__(self, fd: int, guard: "Guard", stack: contextlib.ExitStack) -> None:
        self._fd = fd
        self._guard = guard
        self._stack = stack

    def serve(self, show: Callable[[], None], stop: int, is_stopped: Callable[[], bool]) -> str:
        """Waits for the end; returns why it came."""
        show()
        poll = select.poll()
        for fd in (stop, self._fd, self._guard.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == stop and is_stopped():
                    return "it was ended"
                if fd == self._guard.fileno():
                    return "virtiofsd has ended"
                if fd == self._fd and not _is_open(fd):
                    return "the guest ended it"

    def close(self) -> None:
        """Ends virtiofsd first, so that nothing in the guest waits; then the mount and the device."""
        with self._stack:
            self._guard.end()
            end_connection(self._fd)


def _is_open(fd: int) -> bool:
    try:
        return bool(os.read(fd, PIECE_BYTES))
    except BlockingIOError:
        return True
    except OSError:
        return False


class Guard:
    """The process that keeps virtiofsd. Its socket is readable when virtiofsd has ended."""

    def __init__(self, wanted: WantedServer) -> None:
        """Raises ExecError, and then virtiofsd has ended."""
        self._sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = start_program("vmkit.shares.guard", theirs, subprocess.DEVNULL)
            self._ask(wanted)
        except BaseException:
            self.end()
            raise

    def fileno(self) -> int:
        """Of the socket."""
        return self._sock.fileno()

    def end(self) -> None:
        """Ends virtiofsd; from then on the guest gets errors. The process stays until QEMU takes the device out."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(END_DEADLINE_S)
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(MAX_ANSWER_BYTES):
                pass
        self._sock.close()

    def _ask(self, wanted: WantedServer) -> None:
        self._sock.settimeout(START_DEADLINE_S)
        try:
            self._sock.sendall(json.dumps(asdict(wanted)).encode() + b"\n")
            # One line, and no byte of the next.
            line = b""
            while not line.endswith(b"\n") and (byte := self._sock.recv(1)):
                line += byte
            answer: dict[str, Any] = json.loads(line) if line else {"error": "the process that guards it has ended"}
        except TimeoutError as error:
            raise _refuse(f"virtiofsd did not start within {START_DEADLINE_S:g} s") from error
        except (OSError, ValueError) as error:
            raise _refuse("the process that guards virtiofsd has failed") from error
        if "error" in answer:
            last = str(answer.get("details", "")).rpartition("\n")[2]
            raise _refuse(str(answer["error"]) + (f": {last}" if last else ""))
        self._sock.settimeout(None)


@contextlib.contextmanager
def _plug(entry: Entry, wanted: WantedServer, tag: str) -> Iterator[Guard]:
    """The device is there until the end of the block. Raises ExecError."""
    with contextlib.ExitStack() as stack:
        try:
            # Held: it is root's, and this process may become the folder's owner.
            control = stack.enter_context(open_control(entry))
        except MachineError as error:
            raise _refuse(error.brief) from error
        guard = Guard(wanted)
        stack.callback(guard.end)
        try:
            answer = control.ask(PlugFolder(wanted.socket, tag, os.getpid()), PLUG_DEADLINE_S)
        finally:
            # QEMU has its connection, or gets none.
            Path(wanted.socket).unlink(missing_ok=True)
        if not answer.ok:
            raise _refuse(answer.error)
        try:
            yield guard
        finally:
            guard.end()
            control.ask(UnplugFolder(tag), PLUG_DEADLINE_S)


def _refuse(reason: str) -> ExecError:
    """Another transport may carry this share."""
    return ExecError(f"virtiofs cannot carry it: {reason}", kind=messages.UNSUPPORTED)
