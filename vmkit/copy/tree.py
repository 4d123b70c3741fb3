"""The steps of a copy, for any two sides: a file, a directory with all below it, a link."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from vmkit.copy.engine import Engine, Gate, Step
from vmkit.copy.items import (
    FileError,
    FileReader,
    FileWriter,
    FullError,
    Item,
    ItemKind,
    SinkFolder,
    SourceFolder,
    WholeReader,
)
from vmkit.copy.wire import Xattrs

# Each level has an open directory on the host; a process has 1,024 descriptors by default.
DEPTH_MAX = 250
# Of a tree of failures, a person reads the first ones.
KEPT_FAILURES = 100


@dataclass
class Tally:
    """What a copy has done so far. found_bytes: the sizes of all files that it knows of."""

    files: int = 0
    directories: int = 0
    links: int = 0
    bytes: int = 0
    found_files: int = 0
    found_bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    whole: int = 0
    show: Callable[["Tally"], None] = lambda _tally: None
    # The paths of a file that was copied, on both sides.
    report: Callable[[str, str], None] | None = None

    def move(self, count: int) -> None:
        """Counts bytes that arrived."""
        self.bytes += count
        self.show(self)

    def find(self, item: Item) -> None:
        """Counts a file that will be copied."""
        if item.kind == ItemKind.FILE:
            self.found_files += 1
            self.found_bytes += item.size

    def fail(self, text: str) -> None:
        """Counts a file that was not copied."""
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(text)

    def skip(self, text: str) -> None:
        """Counts a file that has no data to copy: a device, a socket, a FIFO."""
        if len(self.skipped) < KEPT_FAILURES:
            self.skipped.append(text)


class Group:
    """What must be done before a directory is: its listing, and each file in it. Invariant: `_left` counts them."""

    def __init__(self, engine: Engine) -> None:
        self.gate = Gate()
        self._engine = engine
        self._left = 1

    def add(self, count: int) -> None:
        """More files begin."""
        self._left += count

    def done(self) -> None:
        """One is done."""
        self._left -= 1
        if not self._left:
            self._engine.open_gate(self.gate)


@dataclass(frozen=True, slots=True)
class Move:
    """One file that goes from one directory to another."""

    source: SourceFolder
    name: bytes
    item: Item
    sink: SinkFolder
    new_name: bytes
    depth: int = 0


@dataclass
class _First:
    """The first copy of a file with several names. path: None until it is done, and when it failed."""

    gate: Gate = field(default_factory=Gate)
    path: bytes | None = None


class TreeCopy:
    """Copies files side by side. A failure of one is counted, and the others go on; a full destination ends all."""

    def __init__(self, engine: Engine, tally: Tally, *, has_xattrs: bool = False) -> None:
        """has_xattrs: the copies keep extended attributes."""
        self._engine = engine
        self._tally = tally
        self._has_xattrs = has_xattrs
        self._firsts: dict[tuple[int, int], _First] = {}

    def start(self, moves: list[Move], group: Group) -> None:
        """Puts the moves on the engine's stack."""
        group.add(len(moves))
        for move in moves:
            self._tally.find(move.item)
        self._engine.push((move.item.size, partial(self._run, move, group)) for move in moves)

    def _run(self, move: Move, group: Group) -> Step[None]:
        try:
            match move.item.kind:
                case ItemKind.FILE:
                    yield from self._copy_file(move)
                case ItemKind.FOLDER:
                    yield from self._copy_folder(move)
                case ItemKind.LINK:
                    target = yield from move.source.read_link(move.name)
                    yield from move.sink.make_link(move.new_name, target, move.item)
                    self._tally.links += 1
                case ItemKind.OTHER:
                    self._tally.skip(move.source.describe(move.name))
            if self._tally.report is not None and move.item.kind != ItemKind.OTHER:
                self._tally.report(move.source.describe(move.name), move.sink.describe(move.new_name))
        except FileError as error:
            self._tally.fail(f"{move.source.describe(move.name)}: {error.brief}")
        except FullError as error:
            path = move.sink.describe(move.new_name)
            raise FullError(f"cannot write {path}: {error.brief}") from error
        group.done()

    def _copy_folder(self, move: Move) -> Step[None]:
        if move.depth > DEPTH_MAX:
            raise FileError(f"directories are nested more than {DEPTH_MAX} deep")
        source = yield from move.source.open_folder(move.name)
        try:
            sink, is_new = yield from move.sink.make_folder(move.new_name)
        except (FileError, FullError):
            yield from source.close()
            raise
        group = Group(self._engine)
        failure: FileError | None = None
        try:
            while batch := (yield from source.read_batch(with_data=True)):
                self.start([Move(source, name, item, sink, name, move.depth + 1) for name, item in batch], group)
                yield self._engine.find_room()
        except FileError as error:
            failure = error
        group.done()
        yield group.gate
        yield from source.close()
        try:
            if is_new:
                xattrs = (yield from move.source.read_xattrs(move.name)) if self._has_xattrs else ()
                yield from sink.finish(move.item.with_xattrs(xattrs))
        finally:
            yield from sink.close()
        if failure is not None:
            raise failure
        self._tally.directories += 1

    def _copy_file(self, move: Move) -> Step[None]:
        identity = move.item.identity
        if identity is None:
            yield from self._copy_data(move)
            return
        first = self._firsts.get(identity)
        if first is not None:
            yield first.gate
            if first.path is not None and (yield from move.sink.make_hard_link(move.new_name, first.path)):
                self._tally.files += 1
                self._tally.move(move.item.size)
                return
            yield from self._copy_data(move)
            return
        first = self._firsts[identity] = _First()
        try:
            yield from self._copy_data(move)
            first.path = move.sink.locate(move.new_name)
        finally:
            self._engine.open_gate(first.gate)

    def _copy_data(self, move: Move) -> Step[None]:
        reader = yield from move.source.open_reader(move.name, move.item, move.sink.chunk_bytes)
        try:
            xattrs = (yield from move.source.read_xattrs(move.name)) if self._has_xattrs else ()
        except FileError:
            yield from reader.close()
            raise
        yield from copy_open_file(reader, move.sink, move.new_name, self._tally, xattrs)


def copy_open_file(reader: FileReader, sink: SinkFolder, name: bytes, tally: Tally, xattrs: Xattrs = ()) -> Step[None]:
    """Copies an open file to a name, which it gets when it is whole. Raises FileError, FullError."""
    if isinstance(reader, WholeReader):
        is_written = yield from sink.write_whole(name, reader.item.with_xattrs(xattrs), reader.data)
        tally.whole += is_written or reader.is_of_guest
        if is_written:
            tally.move(reader.end)
            tally.files += 1
            return
    writer: FileWriter | None = None
    try:
        writer = yield from sink.open_writer(name, reader.item)
        yield from pump(reader, writer, tally)
        yield from reader.finish()
        yield from writer.finish(reader.item.with_xattrs(xattrs), reader.end)
    except (FileError, FullError):
        yield from reader.close()
        if writer is not None:
            yield from writer.drop()
        raise
    tally.files += 1


def pump(reader: FileReader, writer: FileWriter, tally: Tally) -> Step[None]:
    """Moves all data, with as many requests under way as their windows take. One may always go, so it never stops."""
    while True:
        for offset, data in reader.take():
            writer.put(offset, data)
            tally.move(len(data))
        is_idle = not reader.pending and not writer.pending
        if reader.can_ask and (is_idle or (reader.has_room() and writer.has_room())):
            reader.ask()
        elif is_idle:
            return
        else:
            arrival = yield None
            if arrival is not None and not reader.receive(arrival):
                writer.receive(arrival)
