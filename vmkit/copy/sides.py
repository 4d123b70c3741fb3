"""What copies and syncs share: the connections, the engine that moves bytes, both sides, and a good end."""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmkit.copy.calls import find_item, start_channel
from vmkit.copy.endpoints import Endpoint, split_destination
from vmkit.copy.engine import Channel, ChannelLostError, Engine, Explain, Step, explain_nothing
from vmkit.copy.guest_sink import GuestSink, GuestSinkFolder
from vmkit.copy.guest_source import GuestFolder
from vmkit.copy.host_sink import HostSink, HostSinkFolder
from vmkit.copy.host_source import FOLDER_FLAGS, HostFolder, make_host_item
from vmkit.copy.items import Descriptors, FileError, Item, ItemKind, Keep, join_path
from vmkit.copy.tree import Tally, TreeCopy
from vmkit.copy.wire import XATTRS
from vmkit.errors import ConfigError, MachineError, VmkitError

# A guest that syncs to a slow disk takes long; one that is gone answers never.
SILENCE_S = 120.0
# After an error or Ctrl-C, for the removal of temporary files in a guest.
CLEAN_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class SftpPeer:
    """A machine's SFTP server. label: the machine's name. The copy closes sock. explain: names the machine's end in
    the error of a lost connection.
    """

    label: str
    sock: socket.socket
    explain: Explain = explain_nothing


Connect = Callable[[str], SftpPeer]
Source = HostFolder | GuestFolder
Sink = HostSinkFolder | GuestSinkFolder


class Sides:
    """The state of one copy or sync. Invariant: a machine has one connection as a source, one as the destination."""

    def __init__(self, connect: Connect, keep: Keep, tally: Tally, stack: contextlib.ExitStack) -> None:
        self._connect = connect
        self._keep = keep
        self._stack = stack
        self.tally = tally
        self.engine = Engine()
        self.tree = TreeCopy(self.engine, tally, has_xattrs=keep.xattrs)
        self._opened = Descriptors()
        self._host_sink = HostSink(keep)
        self._guest_sink: GuestSink | None = None
        self._machines: dict[str, Channel] = {}

    def run(self, sources: Sequence[Endpoint], destination: Endpoint, begin: Callable[[], Step[None]]) -> None:
        """Connects to all sides, and runs the steps that `begin` starts to their end. Raises VshError kinds.

        Whatever happens, no descriptor stays open, and no temporary file where the guest still answers.
        """
        try:
            self._run(sources, destination, begin)
        except BaseException as error:
            self._clean_up()
            if isinstance(error, ChannelLostError):
                error.explain()
            raise
        finally:
            self._host_sink.opened.close_all()
            self._opened.close_all()

    def _run(self, sources: Sequence[Endpoint], destination: Endpoint, begin: Callable[[], Step[None]]) -> None:
        self._machines = {one.machine: self._open(one.machine) for one in sources if one.machine is not None}
        target = None if destination.machine is None else self._open(destination.machine)
        if target is not None:
            self._guest_sink = GuestSink(target, self._keep)
        failure: list[VmkitError] = []

        def start() -> Step[None]:
            try:
                for channel in (*self._machines.values(), *([target] if target else [])):
                    yield from start_channel(channel)
                    if self._keep.xattrs and XATTRS not in channel.extensions:
                        raise FileError(f"the SFTP server of '{channel.label}' has no extended attributes")
                yield from begin()
            except FileError as error:
                # Not of one file among others: the copy never began.
                failure.append(error)

        self.engine.push([(0, start)])
        self.engine.run(SILENCE_S)
        if failure:
            raise MachineError(f"cannot copy: {failure[0].brief}") from failure[0]

    def _clean_up(self) -> None:
        """Ends what runs and removes temporary files, as far as a guest still answers."""
        self.engine.abandon()
        self._host_sink.clean_up()
        sink = self._guest_sink
        if sink is not None and sink.unfinished:
            self.engine.push([(0, sink.clean_up)])
            with contextlib.suppress(VmkitError):
                self.engine.run(CLEAN_UP_S)

    def _open(self, machine: str) -> Channel:
        connected = self._connect(machine)
        self._stack.callback(connected.sock.close)
        return self.engine.open_channel(connected.sock, connected.label, connected.explain)

    def find_channel(self, source: Endpoint) -> Channel | None:
        """Returns the connection to a source; None for this host."""
        return None if source.machine is None else self._machines[source.machine]

    def is_same_machine(self, channel: Channel | None) -> bool:
        """Whether the destination is on the machine of this source."""
        return channel is not None and self._guest_sink is not None and channel.label == self._guest_sink.channel.label

    def find_source(self, channel: Channel | None, folder_path: bytes, name: bytes) -> Step[tuple[Source, Item | None]]:
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

    def find_sink(self, destination: Endpoint, *, into: bool, several: bool) -> Step[tuple[Sink, bytes | None]]:
        """Returns the directory that takes the copies, and their name in it; None: their own names."""
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


def is_host_folder(path: bytes) -> bool:
    """Whether a path of this host is a directory, or a link to one."""
    return Path(os.fsdecode(path)).is_dir()
