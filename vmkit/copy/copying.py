"""One copy, from its words to its summary: opens the connections, finds both sides, runs the steps, cleans up."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmkit.copy.calls import find_item, find_real_path, start_channel
from vmkit.copy.endpoints import Endpoint, split_destination, split_source
from vmkit.copy.engine import Channel, Engine, Step
from vmkit.copy.guest_sink import GuestSink, GuestSinkFolder
from vmkit.copy.guest_source import GuestFolder
from vmkit.copy.host_sink import HostSink, HostSinkFolder
from vmkit.copy.host_source import FOLDER_FLAGS, HostFolder, make_host_item
from vmkit.copy.items import (
    Descriptors,
    FileError,
    FullError,
    Item,
    ItemKind,
    Keep,
    SinkFolder,
    SourceFolder,
    join_path,
)
from vmkit.copy.streams import STDIN, STDOUT, StreamFolder, StreamReader
from vmkit.copy.tree import Group, Move, Tally, TreeCopy, copy_open_file
from vmkit.errors import ConfigError, MachineError, VmkitError

# A guest that syncs to a slow disk takes long; one that is gone answers never.
SILENCE_S = 120.0
# After an error or Ctrl-C, for the removal of temporary files in a guest.
CLEAN_UP_S = 5.0
# Of several failures, an error shows the first ones.
SHOWN_FAILURES = 10
PLAIN = Keep()


@dataclass(frozen=True, slots=True)
class SftpPeer:
    """A machine's SFTP server. label: the machine's name. The copy closes sock."""

    label: str
    sock: socket.socket


Connect = Callable[[str], SftpPeer]


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did. skipped: devices, sockets and FIFOs, which have no data to copy."""

    files: int
    directories: int
    links: int
    bytes: int
    seconds: float
    skipped: tuple[str, ...]


class CopyError(VmkitError):
    """Some files were not copied. The details name them. copied: what was."""

    def __init__(self, brief: str, *, copied: Copied, failed: int, details: str = "") -> None:
        super().__init__(brief, details=details)
        self.copied = copied
        self.failed = failed


def copy(
    sources: Sequence[Endpoint],
    destination: Endpoint,
    connect: Connect,
    *,
    keep: Keep = PLAIN,
    into: bool = True,
    show: Callable[[Tally], None] | None = None,
) -> Copied:
    """Copies. into: an existing directory as the destination takes the copies, under their own names.

    show: is called often, with what was done so far. Raises ConfigError, MachineError, SftpError, FullError,
    and CopyError when single files failed.
    """
    started_s = time.monotonic()
    tally = Tally()
    if show is not None:
        tally.show = show
    with contextlib.ExitStack() as stack:
        copying = _Copying(connect, keep, tally, stack)
        try:
            copying.run(sources, destination, into=into)
        except BaseException:
            copying.clean_up()
            raise
        finally:
            copying.close()
    tally.show(tally)
    seconds = time.monotonic() - started_s
    copied = Copied(tally.files, tally.directories, tally.links, tally.bytes, seconds, tuple(tally.skipped))
    if tally.failed == 1:
        raise CopyError(f"cannot copy {tally.failures[0]}", copied=copied, failed=1)
    if tally.failed:
        shown = sorted(tally.failures)[:SHOWN_FAILURES]
        more = [f"and {tally.failed - len(shown)} more"] if tally.failed > len(shown) else []
        raise CopyError(
            f"{tally.failed} files were not copied", copied=copied, failed=tally.failed, details="\n".join(shown + more)
        )
    return copied


class _Copying:
    """The state of one copy. Invariant: each machine has one connection as a source and one as the destination."""

    def __init__(self, connect: Connect, keep: Keep, tally: Tally, stack: contextlib.ExitStack) -> None:
        self._connect = connect
        self._keep = keep
        self._tally = tally
        self._stack = stack
        self._engine = Engine()
        self._tree = TreeCopy(self._engine, tally)
        self._opened = Descriptors()
        self._host_sink = HostSink(keep)
        self._guest_sink: GuestSink | None = None
        self._names: set[bytes] = set()

    def run(self, sources: Sequence[Endpoint], destination: Endpoint, *, into: bool) -> None:
        """Runs the copy to its end. Raises VshError kinds."""
        machines = {one.machine: self._open(one.machine) for one in sources if one.machine is not None}
        target = None if destination.machine is None else self._open(destination.machine)
        if target is not None:
            self._guest_sink = GuestSink(target, self._keep)
        failure: list[VmkitError] = []

        def begin() -> Step[None]:
            try:
                for channel in (*machines.values(), *([target] if target else [])):
                    yield from start_channel(channel)
                yield from self._begin(sources, destination, machines, into=into)
            except FileError as error:
                # Not of one file among others: the copy never began.
                failure.append(error)

        self._engine.push([(0, begin)])
        self._engine.run(SILENCE_S)
        if failure:
            raise MachineError(f"cannot copy: {failure[0].brief}") from failure[0]

    def clean_up(self) -> None:
        """Ends what runs and removes temporary files, as far as a guest still answers."""
        self._engine.abandon()
        self._host_sink.clean_up()
        sink = self._guest_sink
        if sink is not None and sink.unfinished:
            self._engine.push([(0, sink.clean_up)])
            with contextlib.suppress(VmkitError):
                self._engine.run(CLEAN_UP_S)

    def close(self) -> None:
        """Closes what is open on this host."""
        self._host_sink.opened.close_all()
        self._opened.close_all()

    def _open(self, machine: str) -> Channel:
        connected = self._connect(machine)
        self._stack.callback(connected.sock.close)
        return self._engine.open_channel(connected.sock, connected.label)

    def _begin(
        self,
        sources: Sequence[Endpoint],
        destination: Endpoint,
        machines: dict[str, Channel],
        *,
        into: bool,
    ) -> Step[None]:
        """Finds the destination and each source, and puts the copies on the stack."""
        sink, new_name = yield from self._find_sink(destination, into=into, several=len(sources) > 1)
        group = Group(self._engine)
        for source in sources:
            if source.is_stream:
                yield from self._copy_stream(sink, new_name)
                continue
            folder_path, name = split_source(source.path)
            channel = None if source.machine is None else machines[source.machine]
            folder, item = yield from self._find_source(channel, folder_path, name)
            if item is None:
                self._tally.fail(f"{folder.describe(name)}: No such file or directory")
                continue
            if item.kind == ItemKind.OTHER:
                self._tally.fail(f"{folder.describe(name)}: it is a device, a socket or a FIFO")
                continue
            final = name if new_name is None else new_name
            if final != b"." and final in self._names:
                self._tally.fail(f"{folder.describe(name)}: another source has the same name")
                continue
            self._names.add(final)
            if channel is not None and isinstance(sink, GuestSinkFolder):
                reason = yield from self._compare(channel, folder_path, name, sink, final)
                if reason:
                    self._tally.fail(f"{folder.describe(name)}: {reason}")
                    continue
            self._tree.start([Move(folder, name, item, sink, final)], group)

    def _copy_stream(self, sink: SinkFolder, new_name: bytes | None) -> Step[None]:
        if new_name is None:
            raise ConfigError("standard input needs the name of a file as its destination")
        try:
            yield from copy_open_file(StreamReader(STDIN, sink.chunk_bytes), sink, new_name, self._tally)
        except (FileError, FullError) as error:
            self._tally.fail(f"standard input to {sink.describe(new_name)}: {error.brief}")

    def _find_source(
        self, channel: Channel | None, folder_path: bytes, name: bytes
    ) -> Step[tuple[SourceFolder, Item | None]]:
        """Returns the directory of a source and its metadata; the user's own links are followed."""
        if channel is not None:
            path = join_path(folder_path, name)
            found = yield from find_item(channel, path, follow=True)
            if found is None:
                # A link that leads nowhere is copied as a link.
                found = yield from find_item(channel, path, follow=False)
            return GuestFolder(channel, folder_path), found
        try:
            fd = self._opened.open(folder_path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise MachineError(f"{os.fsdecode(folder_path)}: {os.strerror(error.errno or 0)}") from error
        folder = HostFolder(self._opened, fd, folder_path, follows=True)
        for follow in (True, False):
            try:
                return folder, make_host_item(os.stat(name, dir_fd=fd, follow_symlinks=follow))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise MachineError(f"{folder.describe(name)}: {os.strerror(error.errno or 0)}") from error
        return folder, None

    def _find_sink(self, destination: Endpoint, *, into: bool, several: bool) -> Step[tuple[SinkFolder, bytes | None]]:
        """Returns the directory that takes the copies, and their name in it; None: their own names."""
        if destination.is_stream:
            return StreamFolder(STDOUT), b"-"
        path = destination.path
        if self._guest_sink is not None:
            channel = self._guest_sink.channel
            found = yield from find_item(channel, path, follow=True)
            if into and found is not None and found.kind == ItemKind.FOLDER:
                return GuestSinkFolder(self._guest_sink, path), None
            folder, name = self._split(destination, several=several)
            above = yield from find_item(channel, folder, follow=True)
            if above is None or above.kind != ItemKind.FOLDER:
                shown = f"{channel.label}:{os.fsdecode(folder)}"
                raise MachineError(f"{shown} is not {'a' if above else 'an existing'} directory")
            return GuestSinkFolder(self._guest_sink, folder), name
        is_into = into and is_host_folder(path)
        folder, own_name = (path, None) if is_into else self._split(destination, several=several)
        try:
            fd = self._host_sink.opened.open(folder, FOLDER_FLAGS)
        except OSError as error:
            raise MachineError(f"{os.fsdecode(folder)}: {os.strerror(error.errno or 0)}") from error
        return HostSinkFolder(self._host_sink, fd, folder), own_name

    def _split(self, destination: Endpoint, *, several: bool) -> tuple[bytes, bytes]:
        if several:
            where = "" if destination.machine is None else f"{destination.machine}:"
            raise ConfigError(f"{where}{os.fsdecode(destination.path)} is not an existing directory")
        return split_destination(destination.path)

    def _compare(
        self, channel: Channel, folder: bytes, name: bytes, sink: GuestSinkFolder, new_name: bytes
    ) -> Step[str]:
        """Returns why a copy within one machine has no sense: a file onto itself, a directory into itself."""
        if self._guest_sink is None or channel.label != self._guest_sink.channel.label:
            return ""
        path = join_path(folder, name)
        origin = yield from find_real_path(channel, path)
        target = yield from find_real_path(channel, sink.path)
        whole = join_path(target, new_name)
        if whole == origin:
            return "the source and the destination are the same file"
        if whole.startswith(origin.rstrip(b"/") + b"/"):
            return "the destination is inside the source"
        return ""


def is_host_folder(path: bytes) -> bool:
    """Whether a path of this host is a directory, or a link to one."""
    return Path(os.fsdecode(path)).is_dir()
