"""One copy, from its words to its summary: finds the destination and each source, and starts the steps."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmkit.copy.calls import find_real_path
from vmkit.copy.endpoints import Endpoint, split_source
from vmkit.copy.engine import Channel, Step
from vmkit.copy.guest_sink import GuestSinkFolder
from vmkit.copy.items import FileError, FullError, ItemKind, Keep, SinkFolder, join_path
from vmkit.copy.sides import Connect, Sides
from vmkit.copy.streams import STDIN, STDOUT, StreamFolder, StreamReader
from vmkit.copy.tree import Group, Move, Tally, copy_open_file
from vmkit.errors import ConfigError, VmkitError

# Of several failures, an error shows the first ones.
SHOWN_FAILURES = 10
PLAIN = Keep()


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did. whole: files that went in or out of a guest whole in one message.

    skipped: devices, sockets and FIFOs, which have no data to copy.
    """

    files: int
    directories: int
    links: int
    bytes: int
    whole: int
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
    report: Callable[[str, str], None] | None = None,
) -> Copied:
    """Copies. into: an existing directory as the destination takes the copies, under their own names.

    show: is called often, with what was done so far. report: is called with both paths of each file that was copied.

    Raises ConfigError, MachineError, SftpError, FullError,
    and CopyError when single files failed.
    """
    started_s = time.monotonic()
    tally = Tally(report=report)
    if show is not None:
        tally.show = show
    with contextlib.ExitStack() as stack:
        sides = Sides(connect, keep, tally, stack)
        copying = _Copying(sides, sources, destination, into=into)
        sides.run(sources, destination, copying.begin)
    tally.show(tally)
    seconds = time.monotonic() - started_s
    copied = Copied(
        tally.files, tally.directories, tally.links, tally.bytes, tally.whole, seconds, tuple(tally.skipped)
    )
    if tally.failed == 1:
        raise CopyError(f"cannot copy {tally.failures[0]}", copied=copied, failed=1)
    if tally.failed:
        brief = f"{tally.failed} files were not copied"
        raise CopyError(brief, copied=copied, failed=tally.failed, details=render_failures(tally))
    return copied


def render_failures(tally: Tally) -> str:
    """Returns the first failures, one a line."""
    shown = sorted(tally.failures)[:SHOWN_FAILURES]
    more = [f"and {tally.failed - len(shown)} more"] if tally.failed > len(shown) else []
    return "\n".join(shown + more)


class _Copying:
    """Starts the steps of one copy."""

    def __init__(self, sides: Sides, sources: Sequence[Endpoint], destination: Endpoint, *, into: bool) -> None:
        self._sides = sides
        self._tally = sides.tally
        self._sources = sources
        self._destination = destination
        self._into = into
        self._names: set[bytes] = set()

    def begin(self) -> Step[None]:
        """Finds the destination and each source, and puts the copies on the stack."""
        sink: SinkFolder
        new_name: bytes | None
        if self._destination.is_stream:
            sink, new_name = StreamFolder(STDOUT), b"-"
        else:
            several = len(self._sources) > 1
            sink, new_name = yield from self._sides.find_sink(self._destination, into=self._into, several=several)
        group = Group(self._sides.engine)
        for source in self._sources:
            if source.is_stream:
                yield from self._copy_stream(sink, new_name)
                continue
            folder_path, name = split_source(source.path)
            channel = self._sides.find_channel(source)
            folder, item = yield from self._sides.find_source(channel, folder_path, name)
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
            self._sides.tree.start([Move(folder, name, item, sink, final)], group)

    def _copy_stream(self, sink: SinkFolder, new_name: bytes | None) -> Step[None]:
        if new_name is None:
            raise ConfigError("standard input needs the name of a file as its destination")
        try:
            yield from copy_open_file(StreamReader(STDIN, sink.chunk_bytes), sink, new_name, self._tally)
        except (FileError, FullError) as error:
            self._tally.fail(f"standard input to {sink.describe(new_name)}: {error.brief}")

    def _compare(
        self, channel: Channel, folder: bytes, name: bytes, sink: GuestSinkFolder, new_name: bytes
    ) -> Step[str]:
        """Returns why a copy within one machine has no sense: a file onto itself, a directory into itself."""
        if not self._sides.is_same_machine(channel):
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
