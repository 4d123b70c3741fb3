"""The steps of a sync: compares two directories, copies what differs, and deletes what the source does not have.

A directory is listed on both sides, and each name in it is one job. What a job copies goes through TreeCopy, so each
file is atomic. A directory of the destination is entered only under a name that its listing calls a directory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from vmkit.copy.comparing import find_digest
from vmkit.copy.engine import Engine, Step
from vmkit.copy.excludes import Excludes
from vmkit.copy.items import FileError, FullError, Item, ItemKind, SourceFolder, SyncedFolder, is_same_time
from vmkit.copy.tree import DEPTH_MAX, Group, Move, Tally, TreeCopy
from vmkit.copy.wire import Xattrs
from vmkit.copy.xattrs import find_changes

ROOT = b""


class Action(StrEnum):
    """What a sync does with one file of the destination."""

    COPY = "copy"
    LINK = "link"
    MAKE = "make"
    CHANGE = "change"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Rules:
    """How two directories are made equal. The fields are the options of `vmkit sync`."""

    delete: bool = False
    checksum: bool = False
    dry_run: bool = False
    excludes: Excludes | None = None


@dataclass
class SyncTally(Tally):
    """What a sync has done, and a dry run would do. tell: is called with each action and its path, before it is done.

    A path is relative to the directory that is synced; that of a directory ends in `/`.
    """

    deleted: int = 0
    changed: int = 0
    unchanged: int = 0
    actions: int = 0
    tell: Callable[[Action, bytes], None] = lambda _action, _path: None

    def note(self, action: Action, path: bytes) -> None:
        """An action begins."""
        self.actions += 1
        self.tell(action, path)


@dataclass(frozen=True, slots=True)
class FolderPair:
    """A directory on both sides, and its path below the root.

    sink: None in a dry run, where the directory is not made. old: what was there before, None for a new directory.
    """

    source: SourceFolder
    sink: SyncedFolder | None
    item: Item
    old: Item | None
    path: bytes = ROOT
    depth: int = 0


@dataclass
class _Level:
    """A directory whose names are being compared. there: what the destination has that the source had not so far."""

    pair: FolderPair
    listing: SourceFolder | None
    group: Group
    there: dict[bytes, Item] = field(default_factory=dict)


class SyncTree:
    """Makes directories equal. A failure of one file is counted, and the others go on."""

    def __init__(
        self, engine: Engine, tree: TreeCopy, tally: SyncTally, rules: Rules, *, has_xattrs: bool = False
    ) -> None:
        """has_xattrs: extended attributes are made equal, too."""
        self._engine = engine
        self._tree = tree
        self._tally = tally
        self._rules = rules
        self._has_xattrs = has_xattrs

    def sync(self, pair: FolderPair) -> Step[None]:
        """Makes the destination of a pair equal to its source, and closes both. Raises FileError, FullError."""
        try:
            yield from self._sync_open(pair)
        finally:
            yield from pair.source.close()
            if pair.sink is not None:
                yield from pair.sink.close()

    def _sync_open(self, pair: FolderPair) -> Step[None]:
        before = self._tally.actions
        level = _Level(pair, None, Group(self._engine))
        if pair.sink is not None and pair.old is not None:
            level.listing = yield from pair.sink.open_listing()
        failure: FileError | None = None
        try:
            if level.listing is not None:
                level.there = yield from read_all(level.listing)
            while batch := (yield from pair.source.read_batch()):
                for name, item in batch:
                    self._compare(level, name, item)
                yield self._engine.find_room()
            if self._rules.delete:
                for name, old in level.there.items():
                    path = join(pair.path, name)
                    if pair.sink is not None and not self._is_excluded(path, old):
                        self._push(level, name, 0, partial(self._delete, pair.sink, name, old, path, pair.depth + 1))
        except FileError as error:
            # What was not listed is not deleted.
            failure = error
        level.group.done()
        yield level.group.gate
        if level.listing is not None:
            yield from level.listing.close()
        if failure is not None:
            raise failure
        if pair.path != ROOT or pair.old is None:
            yield from self._finish(pair, is_touched=self._tally.actions != before)

    def _finish(self, pair: FolderPair, *, is_touched: bool) -> Step[None]:
        """Gives a directory its mode and times, which an action in it has changed."""
        if pair.sink is None:
            return
        changes: Xattrs = ()
        if self._has_xattrs:
            listing = yield from pair.sink.open_listing()
            try:
                changes = yield from self._compare_xattrs(pair.source, pair.sink, listing, b".")
            finally:
                yield from listing.close()
        if pair.old is not None and (changes or not is_touched):
            if not changes and pair.sink.is_current(pair.item, pair.old):
                return
            self._tally.note(Action.CHANGE, pair.path + b"/")
            self._tally.changed += 1
        if not self._rules.dry_run:
            yield from pair.sink.finish(pair.item.with_xattrs(changes))

    def _compare_xattrs(
        self, source: SourceFolder, sink: SyncedFolder, listing: SourceFolder, name: bytes
    ) -> Step[Xattrs]:
        """Returns what makes the extended attributes of one file equal; `.` is the directory. Raises FileError."""
        wanted = yield from source.read_xattrs(name)
        found = yield from listing.read_xattrs(name)
        return find_changes(sink.choose_xattrs(wanted), sink.choose_xattrs(found))

    def _compare(self, level: _Level, name: bytes, item: Item) -> None:
        """Decides what a name of the source needs, and starts it."""
        old = level.there.pop(name, None)
        path = join(level.pair.path, name)
        if self._is_excluded(path, item):
            return
        if item.kind == ItemKind.OTHER:
            self._tally.skip(level.pair.source.describe(name))
        elif item.kind == ItemKind.FOLDER:
            self._push(level, name, 0, partial(self._enter, level, name, item, old, path))
        elif old is not None and old.kind == ItemKind.FOLDER:
            self._push(level, name, 0, partial(self._replace, level, name, item, old, path))
        elif old is None or old.kind != item.kind:
            self._copy(level, name, item, path)
        elif item.kind == ItemKind.LINK:
            self._push(level, name, 0, partial(self._compare_links, level, name, item, path))
        elif old.size != item.size or not (self._rules.checksum or is_same_time(item, old)):
            self._copy(level, name, item, path)
        elif self._rules.checksum:
            self._push(level, name, item.size, partial(self._compare_data, level, name, item, old, path))
        elif self._has_xattrs:
            self._push(level, name, 0, partial(self._compare_all_metadata, level, name, item, old, path))
        else:
            self._compare_metadata(level, name, item, old, path)

    def _copy(self, level: _Level, name: bytes, item: Item, path: bytes) -> None:
        self._tally.note(Action.LINK if item.kind == ItemKind.LINK else Action.COPY, path)
        sink = level.pair.sink
        if self._rules.dry_run or sink is None:
            if item.kind == ItemKind.LINK:
                self._tally.links += 1
            else:
                self._tally.files += 1
                self._tally.bytes += item.size
            return
        self._tree.start([Move(level.pair.source, name, item, sink, name)], level.group)

    def _compare_all_metadata(self, level: _Level, name: bytes, item: Item, old: Item, path: bytes) -> Step[None]:
        sink = level.pair.sink
        if self._has_xattrs and sink is not None:
            assert level.listing is not None
            changes = yield from self._compare_xattrs(level.pair.source, sink, level.listing, name)
            item = item.with_xattrs(changes)
        self._compare_metadata(level, name, item, old, path)

    def _compare_metadata(self, level: _Level, name: bytes, item: Item, old: Item, path: bytes) -> None:
        """Gives a file with the same data its metadata, where it differs. item.xattrs: what differs of those."""
        sink = level.pair.sink
        if sink is None or (not item.xattrs and sink.is_current(item, old)):
            self._tally.unchanged += 1
            return
        self._tally.note(Action.CHANGE, path)
        self._tally.changed += 1
        if not self._rules.dry_run:
            self._push(level, name, 0, partial(sink.set_metadata, name, item))

    def _compare_links(self, level: _Level, name: bytes, item: Item, path: bytes) -> Step[None]:
        assert level.listing is not None
        wanted = yield from level.pair.source.read_link(name)
        found = yield from level.listing.read_link(name)
        if wanted == found:
            self._tally.unchanged += 1
        else:
            self._copy(level, name, item, path)

    def _compare_data(self, level: _Level, name: bytes, item: Item, old: Item, path: bytes) -> Step[None]:
        assert level.listing is not None
        sink = level.pair.sink
        assert sink is not None
        found = yield from find_digest((yield from level.listing.open_reader(name, old, sink.chunk_bytes)))
        wanted = yield from find_digest((yield from level.pair.source.open_reader(name, item, sink.chunk_bytes)))
        if wanted == found:
            yield from self._compare_all_metadata(level, name, item, old, path)
        else:
            self._copy(level, name, item, path)

    def _enter(self, level: _Level, name: bytes, item: Item, old: Item | None, path: bytes) -> Step[None]:
        """Makes a directory of the source, or enters it, and syncs it."""
        pair = level.pair
        if pair.depth >= DEPTH_MAX:
            raise FileError(f"directories are nested more than {DEPTH_MAX} deep")
        if old is not None and old.kind != ItemKind.FOLDER:
            yield from self._make_way(pair, name, old, path)
            old = None
        source = yield from pair.source.open_folder(name)
        sink: SyncedFolder | None = None
        try:
            if old is None:
                self._tally.note(Action.MAKE, path + b"/")
                self._tally.directories += 1
            if pair.sink is not None and old is not None:
                sink = yield from pair.sink.enter(name)
            elif pair.sink is not None and not self._rules.dry_run:
                sink, _ = yield from pair.sink.make_folder(name)
        except (FileError, FullError):
            yield from source.close()
            raise
        yield from self.sync(FolderPair(source, sink, item, old, path, pair.depth + 1))

    def _replace(self, level: _Level, name: bytes, item: Item, old: Item, path: bytes) -> Step[None]:
        """Puts a file or a link in the place of a directory."""
        yield from self._make_way(level.pair, name, old, path)
        self._copy(level, name, item, path)

    def _make_way(self, pair: FolderPair, name: bytes, old: Item, path: bytes) -> Step[None]:
        """Deletes what has the name of a file of another kind. Raises FileError."""
        if not self._rules.delete:
            raise FileError(f"the destination has a {old.kind} of this name, which --delete replaces")
        assert pair.sink is not None
        if not (yield from self._delete(pair.sink, name, old, path, pair.depth + 1)):
            raise FileError(f"the destination has a {old.kind} of this name, with files that stay")

    def _delete(self, sink: SyncedFolder, name: bytes, old: Item, path: bytes, depth: int) -> Step[bool]:
        """Deletes a file, or a directory with all below it. Returns whether it is gone: what is excluded stays."""
        is_folder = old.kind == ItemKind.FOLDER
        if is_folder and not (yield from self._empty(sink, name, path, depth)):
            return False
        self._tally.note(Action.DELETE, path + b"/" if is_folder else path)
        if not self._rules.dry_run:
            yield from sink.delete(name, is_folder=is_folder)
        self._tally.deleted += 1
        return True

    def _empty(self, sink: SyncedFolder, name: bytes, path: bytes, depth: int) -> Step[bool]:
        """Deletes all in a directory. Returns whether all is gone."""
        if depth > DEPTH_MAX:
            raise FileError(f"directories are nested more than {DEPTH_MAX} deep")
        folder = yield from sink.enter(name)
        try:
            listing = yield from folder.open_listing()
            try:
                there = yield from read_all(listing)
            finally:
                yield from listing.close()
            left = set(there)
            group = Group(self._engine)

            def delete(one: bytes, old: Item, below: bytes) -> Step[None]:
                if (yield from self._delete(folder, one, old, below, depth + 1)):
                    left.discard(one)

            for one, old in there.items():
                below = join(path, one)
                if not self._is_excluded(below, old):
                    self._push_to(group, folder.describe(one), 0, partial(delete, one, old, below))
            group.done()
            yield group.gate
        finally:
            yield from folder.close()
        return not left

    def _is_excluded(self, path: bytes, item: Item) -> bool:
        excludes = self._rules.excludes
        return excludes is not None and excludes.has(path, is_folder=item.kind == ItemKind.FOLDER)

    def _push(self, level: _Level, name: bytes, cost_bytes: int, make: "Callable[[], Step[object]]") -> None:
        self._push_to(level.group, level.pair.source.describe(name), cost_bytes, make)

    def _push_to(self, group: Group, where: str, cost_bytes: int, make: "Callable[[], Step[object]]") -> None:
        """Starts a job of a directory. where: the file, for an error."""
        group.add(1)
        self._engine.push([(cost_bytes, partial(self._guard, group, where, make))])

    def _guard(self, group: Group, where: str, make: "Callable[[], Step[object]]") -> Step[None]:
        try:
            yield from make()
        except FileError as error:
            self._tally.fail(f"{where}: {error.brief}")
        except FullError as error:
            raise FullError(f"cannot write the copy of {where}: {error.brief}") from error
        group.done()


def read_all(folder: SourceFolder) -> Step[dict[bytes, Item]]:
    """Returns all that a directory has. Raises FileError."""
    found: dict[bytes, Item] = {}
    while batch := (yield from folder.read_batch()):
        found.update(batch)
    return found


def join(path: bytes, name: bytes) -> bytes:
    """Returns a path below the root."""
    return name if path == ROOT else path + b"/" + name
