"""One sync, from its words to its summary: finds both directories, and starts the steps."""

import contextlib
import time
from dataclasses import dataclass

from vmkit.copy.calls import find_real_path
from vmkit.copy.copying import render_failures
from vmkit.copy.endpoints import Endpoint, split_source
from vmkit.copy.engine import Channel, Step
from vmkit.copy.guest_sink import GuestSinkFolder
from vmkit.copy.items import FileError, FullError, Item, ItemKind, Keep, SyncedFolder, join_path
from vmkit.copy.sides import Connect, Sides, Sink, Source
from vmkit.copy.sync_tree import FolderPair, Rules, SyncTally, SyncTree, read_all
from vmkit.errors import ConfigError, MachineError, VmkitError

PLAIN = Keep()


@dataclass(frozen=True, slots=True)
class Synced:
    """What a sync did, or in a dry run would do. unchanged: files and links that needed nothing.

    changed: files and directories that got another mode or time alone. skipped: devices, sockets and FIFOs.
    """

    files: int
    directories: int
    links: int
    bytes: int
    changed: int
    deleted: int
    unchanged: int
    seconds: float
    skipped: tuple[str, ...]


class SyncError(VmkitError):
    """Some files were not synced. The details name them. synced: what was."""

    def __init__(self, brief: str, *, synced: Synced, failed: int, details: str = "") -> None:
        super().__init__(brief, details=details)
        self.synced = synced
        self.failed = failed


def sync(
    source: Endpoint,
    destination: Endpoint,
    connect: Connect,
    *,
    rules: Rules,
    keep: Keep = PLAIN,
    tally: SyncTally | None = None,
) -> Synced:
    """Makes the destination equal to the source, as far as the rules say. Both are directories.

    tally: counts, and its callables get actions and progress. Raises ConfigError, MachineError, SftpError, FullError,
    and SyncError when single files failed.
    """
    started_s = time.monotonic()
    tally = SyncTally() if tally is None else tally
    with contextlib.ExitStack() as stack:
        sides = Sides(connect, keep, tally, stack)
        tree = SyncTree(sides.engine, sides.tree, tally, rules, has_xattrs=keep.xattrs)
        syncing = _Syncing(sides, tree, rules)
        sides.run([source], destination, lambda: syncing.begin(source, destination))
    tally.show(tally)
    seconds = time.monotonic() - started_s
    done = (tally.files, tally.directories, tally.links, tally.bytes, tally.changed, tally.deleted, tally.unchanged)
    synced = Synced(*done, seconds, tuple(tally.skipped))
    if tally.failed == 1:
        raise SyncError(f"cannot sync {tally.failures[0]}", synced=synced, failed=1)
    if tally.failed:
        brief = f"{tally.failed} files were not synced"
        raise SyncError(brief, synced=synced, failed=tally.failed, details=render_failures(tally))
    return synced


class _Syncing:
    """Finds the two directories of one sync."""

    def __init__(self, sides: Sides, tree: SyncTree, rules: Rules) -> None:
        self._sides = sides
        self._tree = tree
        self._rules = rules

    def begin(self, source: Endpoint, destination: Endpoint) -> Step[None]:
        """Finds both sides, and syncs them. Raises VshError kinds."""
        above, name = split_source(source.path)
        channel = self._sides.find_channel(source)
        origin, item = yield from self._sides.find_source(channel, above, name)
        shown = origin.describe(name)
        if item is None:
            raise MachineError(f"cannot sync {shown}: No such file or directory")
        if item.kind != ItemKind.FOLDER:
            raise ConfigError(f"cannot sync {shown}: it is not a directory", hint="vmkit cp copies a file")
        sink, new_name = yield from self._sides.find_sink(destination, into=True, several=False)
        if channel is not None and isinstance(sink, GuestSinkFolder) and self._sides.is_same_machine(channel):
            yield from self._check_places(channel, join_path(above, name), sink, new_name)
        target: SyncedFolder | None = sink
        try:
            if new_name is not None:
                target = yield from self._make_root(sink, new_name)
            pair = yield from self._open(origin, name, item, target, is_new=new_name is not None)
            yield from self._tree.sync(pair)
        except FileError as error:
            raise MachineError(f"cannot sync {shown}: {error.brief}") from error
        except FullError as error:
            raise FullError(f"cannot write the copy of {shown}: {error.brief}") from error

    def _open(
        self, origin: Source, name: bytes, item: Item, target: SyncedFolder | None, *, is_new: bool
    ) -> Step[FolderPair]:
        opened = yield from origin.open_folder(name)
        return FolderPair(opened, target, item, None if is_new else item)

    def _make_root(self, sink: Sink, name: bytes) -> Step[SyncedFolder | None]:
        """Makes the destination itself; in a dry run, only looks whether something has its name."""
        try:
            if not self._rules.dry_run:
                return (yield from sink.make_folder(name))[0]
            listing = yield from sink.open_listing()
            there = yield from read_all(listing)
            yield from listing.close()
            if name in there:
                raise FileError(f"a {there[name].kind} has this name")
        except FileError as error:
            raise MachineError(f"cannot make {sink.describe(name)}: {error.brief}") from error
        return None

    def _check_places(self, channel: Channel, path: bytes, sink: GuestSinkFolder, new_name: bytes | None) -> Step[None]:
        """Raises ConfigError where a sync within one machine would read what it writes."""
        origin = yield from find_real_path(channel, path)
        target = yield from find_real_path(channel, sink.path)
        if new_name is not None:
            target = join_path(target, new_name)
        if target == origin:
            raise ConfigError("the source and the destination are the same directory")
        if target.startswith(origin.rstrip(b"/") + b"/"):
            raise ConfigError("the destination is inside the source")
        if origin.startswith(target.rstrip(b"/") + b"/"):
            raise ConfigError("the source is inside the destination")
