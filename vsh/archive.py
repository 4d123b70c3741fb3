"""Copies files and directories in and out of a guest as a tar stream, through a session that runs the guest's tar.

Owns the copy between a path here and a path there. It does not trust the guest's stream: it writes nothing outside the
destination, follows no link, and makes only files, directories, symbolic links and hard links within the copy.
"""

import os
import posixpath
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Protocol, Self

from vsh.errors import UsageError, VshError
from vsh.process import DEVNULL, PIPE
from vsh.tarstream import Member, read_members

# Of a failed tar's stderr, an error shows this much.
SHOWN_BYTES = 2000
CHUNK_BYTES = 1 << 18
# A tar pads its archive to a block, which is 10 KiB unless it is told otherwise.
PADDING_BYTES_MAX = 1 << 20
# Directories stay writable for their owner while they are filled; setuid, setgid and sticky bits are dropped.
MODE_MASK = 0o777


class RunningCommand(Protocol):
    """A command that runs in a guest, with pipes; a with-block waits for its end."""

    @property
    def stdin(self) -> IO[bytes] | None: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    @property
    def stderr(self) -> IO[bytes] | None: ...

    def wait(self) -> int:
        """Waits for the command's end; returns its exit status."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> object: ...


class CommandStarter(Protocol):
    """Starts commands in a guest; vsh.client.Client is one."""

    def popen(self, argv: list[str], *, stdin: int, stdout: int, user: str) -> RunningCommand:
        """As Client.popen."""


def push(client: CommandStarter, source: str, destination: str, *, user: str = "") -> None:
    """Copies a file or a directory of the host to the guest's path `destination`, whose directory must exist.

    Raises UsageError for a source that is missing, VshError when the guest's tar fails.
    """
    if not os.path.lexists(source):
        raise UsageError(f"cannot push {source}: no such file or directory")
    folder, name = _split(destination)
    with client.popen(["tar", "-x", "-f", "-", "-C", folder], stdin=PIPE, stdout=DEVNULL, user=user) as process:
        assert process.stdin is not None
        words = _Words(process)
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|", bufsize=CHUNK_BYTES, format=tarfile.GNU_FORMAT) as tar:
                tar.add(source, arcname=name)
            process.stdin.close()
        except BrokenPipeError:
            pass  # the guest's tar has failed, and its stderr has the reason
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise VshError(f"cannot push {source}: {where}{error.strerror or error}") from error
        words.check(f"cannot push {source} to {destination}")


def pull(client: CommandStarter, source: str, destination: str, *, user: str = "") -> None:
    """Copies a file or a directory of the guest to the host's path `destination`, which must not exist as a directory.

    The copy appears there whole, by a rename. Raises UsageError, VshError; then the old destination is unchanged.
    """
    folder, name = _split(source)
    if os.path.isdir(destination) and not os.path.islink(destination):
        raise UsageError(f"cannot pull to {destination}: it is a directory", hint="name the path of the copy itself")
    target_folder = os.path.dirname(os.path.abspath(destination))
    try:
        work = tempfile.mkdtemp(prefix=".vsh-pull-", dir=target_folder)
    except OSError as error:
        raise UsageError(f"cannot pull to {destination}: {error.strerror}") from error
    try:
        with client.popen(
            ["tar", "-c", "-f", "-", "-C", folder, "--", name], stdin=DEVNULL, stdout=PIPE, user=user
        ) as process:
            assert process.stdout is not None
            words = _Words(process)
            try:
                mode = _unpack(process.stdout, work, name)
            finally:
                # A tar that failed cuts its archive off, and has said why.
                if len(process.stdout.read(PADDING_BYTES_MAX)) < PADDING_BYTES_MAX:
                    words.check(f"cannot pull {source}")
        copy = os.path.join(work, name)
        if not os.path.lexists(copy):
            raise VshError(f"cannot pull {source}: the guest sent no such file")
        os.replace(copy, destination)
        if mode is not None:
            # Only now: a directory that may not be written to cannot be moved, but by root.
            os.chmod(destination, mode)
    except OSError as error:
        raise VshError(f"cannot pull {source} to {destination}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _split(path: str) -> tuple[str, str]:
    """Splits a guest's path into directory and name. Raises UsageError for one without a name."""
    folder, name = posixpath.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        raise UsageError(f"the guest's path {path!r} must end in a name")
    return folder or ".", name


class _Words:
    """Reads a command's stderr while its other streams are busy, so that a tar with many complaints does not stall.

    Keeps the first SHOWN_BYTES.
    """

    def __init__(self, process: RunningCommand) -> None:
        self._process = process
        self._kept = b""
        self._thread = threading.Thread(target=self._listen, name="vsh-stderr", daemon=True)
        self._thread.start()

    def check(self, brief: str) -> None:
        """Waits for the command's end. Raises VshError with its stderr when it failed."""
        if self._process.wait():
            self._thread.join()
            raise VshError(brief, details=self._kept.decode(errors="replace"))

    def _listen(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        try:
            while data := stderr.read(CHUNK_BYTES):
                self._kept += data[: SHOWN_BYTES - len(self._kept)]
        except (OSError, ValueError):
            pass  # the caller has closed it


def _unpack(stream: IO[bytes], work: str, name: str) -> int | None:
    """Writes `name` and everything below it from the stream into `work`.

    Returns the mode for `name` when it is a directory, else None. Raises VshError.
    """
    folders = {""}
    modes: list[tuple[str, int]] = []
    for member, data in read_members(stream):
        path = posixpath.normpath(member.name)
        parent = posixpath.dirname(path)
        is_below = path == name or path.startswith(name + "/")
        # A parent that this copy has not made may be a link that the guest sent before.
        if not is_below or ".." in path.split("/") or parent not in folders:
            raise VshError(f"the guest sent a path outside the copy: {member.name!r}")
        target = os.path.join(work, path)
        if member.is_folder:
            os.mkdir(target, 0o700)
            folders.add(path)
            modes.append((target, member.mode & MODE_MASK))
        elif member.is_symlink:
            os.symlink(member.linkname, target)
        elif member.is_file:
            _write(member, data, target)
        elif member.is_hard_link:
            _link(work, member, target, name)
        # Devices, FIFOs and sockets have no meaning here.
    root = os.path.join(work, name)
    for target, mode in reversed(modes):
        if target != root:
            os.chmod(target, mode)
    return modes[0][1] if modes and modes[0][0] == root else None


def _write(member: Member, data: Iterator[bytes], target: str) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        for piece in data:
            file.write(piece)
        os.fchmod(fd, member.mode & MODE_MASK)
    os.utime(target, (member.mtime, member.mtime))


def _link(work: str, member: Member, target: str, name: str) -> None:
    """Makes a hard link to another file of the copy. Raises VshError for a link to any other file."""
    origin = posixpath.normpath(member.linkname)
    if not (origin == name or origin.startswith(name + "/")) or ".." in origin.split("/"):
        raise VshError(f"the guest sent a link out of the copy: {member.linkname!r}")
    path = os.path.join(work, origin)
    if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path) or not os.path.isfile(path):
        raise VshError(f"the guest sent a link to what it did not send: {member.linkname!r}")
    os.link(path, target, follow_symlinks=False)
