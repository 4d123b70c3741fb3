"""The guest as a destination: writes files under temporary names by SFTP, and renames them when they are whole."""

from dataclasses import replace

from vmkit.copy import wire
from vmkit.copy.calls import AnswerError, ask, check_done, do, explain_write, find_item, wait_for
from vmkit.copy.connection import Ticket
from vmkit.copy.engine import Arrival, Channel, Step
from vmkit.copy.guest_source import GuestFolder, join, render_path
from vmkit.copy.items import FileError, FullError, Item, ItemKind, Keep, Piece, is_same_metadata, make_temporary_name
from vmkit.copy.wire import OPEN_CREATE, OPEN_EXCLUSIVE, OPEN_WRITE, FileAttributes, HandleReply, Kind, Xattrs
from vmkit.copy.xattrs import choose_for_guest

ZEROS = bytes(wire.CHUNK_BYTES_MAX)
# SFTP 3 counts seconds in 32 bits without a sign.
TIME_S_MAX = (1 << 32) - 1
MODE_BITS = 0o7777
PRIVATE = FileAttributes(mode=0o600)


class GuestSink:
    """What all directories of a copy into one guest share. unfinished: temporary files that exist."""

    def __init__(self, channel: Channel, keep: Keep) -> None:
        self.channel = channel
        self.keep = keep
        self.unfinished: set[bytes] = set()

    def clean_up(self) -> Step[None]:
        """Removes the temporary files that an interrupted copy has left."""
        tickets = [self.channel.send(Kind.REMOVE, path) for path in self.unfinished]
        yield from wait_for(tickets)
        self.unfinished.clear()

    def rename(self, old: bytes, new: bytes) -> Step[None]:
        """Gives a file its name, also in place of another. Raises AnswerError.

        Without posix-rename the old file is removed first: SFTP 3 itself has no rename onto another file.
        """
        if wire.POSIX_RENAME in self.channel.extensions:
            yield from do(self.channel, Kind.EXTENDED, wire.POSIX_RENAME, old, new)
            return
        try:
            yield from do(self.channel, Kind.RENAME, old, new)
        except AnswerError:
            yield from do(self.channel, Kind.REMOVE, new)
            yield from do(self.channel, Kind.RENAME, old, new)

    def render_attributes(self, item: Item, size: int | None = None) -> bytes:
        """Returns the attributes that a finished file gets. Times that SFTP cannot count are left out."""
        atime, mtime = item.atime_ns // 10**9, item.mtime_ns // 10**9
        has_times = 0 <= atime <= TIME_S_MAX and 0 <= mtime <= TIME_S_MAX
        uid, gid = (item.uid, item.gid) if self.keep.owners else (None, None)
        xattrs = choose_for_guest(item.xattrs)
        attributes = FileAttributes(size, uid, gid, item.mode, xattrs=xattrs)
        if has_times:
            attributes = replace(attributes, atime_s=atime, mtime_s=mtime)
        return wire.pack_attributes(attributes)


class GuestSinkFolder:
    """A directory of the guest, by its path."""

    def __init__(self, sink: GuestSink, path: bytes) -> None:
        self._sink = sink
        self._channel = sink.channel
        self.path = path

    @property
    def chunk_bytes(self) -> int:
        return self._channel.limits.write_bytes

    def describe(self, name: bytes) -> str:
        return render_path(self._channel, self.path, name)

    def make_folder(self, name: bytes) -> "Step[tuple[GuestSinkFolder, bool]]":
        if name == b".":
            return GuestSinkFolder(self._sink, self.path), False
        path = join(self.path, name)
        try:
            # Writable for its owner until it is full.
            yield from do(self._channel, Kind.MKDIR, path, tail=wire.pack_attributes(FileAttributes(mode=0o700)))
        except AnswerError as error:
            found = yield from find_item(self._channel, path, follow=False)
            if found is None:
                raise (yield from explain_write(self._channel, self.path, error)) from error
            if found.kind != ItemKind.FOLDER:
                raise FileError(f"a {found.kind} has this name") from error
            return GuestSinkFolder(self._sink, path), False
        return GuestSinkFolder(self._sink, path), True

    def open_writer(self, name: bytes, item: Item) -> "Step[GuestWriter]":
        temporary = join(self.path, make_temporary_name())
        flags = OPEN_WRITE | OPEN_CREATE | OPEN_EXCLUSIVE
        tail = flags.to_bytes(4, "big") + wire.pack_attributes(PRIVATE)
        # Before the reply: an interruption must not leave it.
        self._sink.unfinished.add(temporary)
        try:
            handle = yield from ask(self._channel, HandleReply, Kind.OPEN, temporary, tail=tail)
        except AnswerError as error:
            self._sink.unfinished.discard(temporary)
            raise (yield from explain_write(self._channel, self.path, error)) from error
        return GuestWriter(self._sink, self, name, temporary, handle.value)

    def write_whole(self, name: bytes, item: Item, data: Piece) -> Step[bool]:
        if wire.WRITE_FILE not in self._channel.extensions or len(data) > wire.WHOLE_BYTES_MAX:
            return False
        size = len(data)
        if data and not data[0] and bytes(data) == ZEROS[:size]:
            # A hole, as in GuestWriter.
            data = b""
        temporary, path = join(self.path, make_temporary_name()), join(self.path, name)
        flags = wire.WRITE_FILE_SYNC if self._sink.keep.fsync else 0
        tail = flags.to_bytes(4, "big") + self._sink.render_attributes(item, None if len(data) == size else size)
        self._sink.unfinished.add(temporary)
        ticket = self._channel.send(Kind.EXTENDED, wire.WRITE_FILE, temporary, path, tail=tail, data=memoryview(data))
        (reply,) = yield from wait_for([ticket])
        # The server has renamed or removed it.
        self._sink.unfinished.discard(temporary)
        try:
            check_done(reply)
        except AnswerError as error:
            raise (yield from self._explain(path, error)) from error
        return True

    def _explain(self, path: bytes, error: AnswerError) -> Step[FileError | FullError]:
        """Finds out why a file did not get its name."""
        found = yield from find_item(self._channel, path, follow=False)
        if found is not None and found.kind == ItemKind.FOLDER:
            return FileError("Is a directory")
        return (yield from explain_write(self._channel, self.path, error))

    def make_link(self, name: bytes, target: bytes, item: Item) -> Step[None]:
        temporary = join(self.path, make_temporary_name())
        self._sink.unfinished.add(temporary)
        try:
            # OpenSSH has the paths in this order, and other servers follow it, not the draft.
            yield from do(self._channel, Kind.SYMLINK, target, temporary)
        except AnswerError as error:
            self._sink.unfinished.discard(temporary)
            raise (yield from explain_write(self._channel, self.path, error)) from error
        yield from self.commit(temporary, name)

    def enter(self, name: bytes) -> "Step[GuestSinkFolder]":
        yield from ()
        return GuestSinkFolder(self._sink, join(self.path, name))

    def open_listing(self) -> Step[GuestFolder]:
        return (yield from GuestFolder(self._channel, self.path).open_folder(b"."))

    def delete(self, name: bytes, *, is_folder: bool) -> Step[None]:
        yield from do(self._channel, Kind.RMDIR if is_folder else Kind.REMOVE, join(self.path, name))

    def is_current(self, item: Item, old: Item) -> bool:
        return is_same_metadata(item, old, MODE_BITS, has_owners=self._sink.keep.owners)

    def choose_xattrs(self, xattrs: Xattrs) -> Xattrs:
        return choose_for_guest(xattrs)

    def set_metadata(self, name: bytes, item: Item) -> Step[None]:
        yield from do(self._channel, Kind.SETSTAT, join(self.path, name), tail=self._sink.render_attributes(item))

    def locate(self, name: bytes) -> bytes:
        return join(self.path, name)

    def make_hard_link(self, name: bytes, first: bytes) -> Step[bool]:
        if wire.HARD_LINK not in self._channel.extensions:
            return False
        temporary = join(self.path, make_temporary_name())
        self._sink.unfinished.add(temporary)
        try:
            yield from do(self._channel, Kind.EXTENDED, wire.HARD_LINK, first, temporary)
        except AnswerError:
            self._sink.unfinished.discard(temporary)
            return False
        yield from self.commit(temporary, name)
        # rename(2) does nothing when both names are links of one file already.
        yield from wait_for([self._channel.send(Kind.REMOVE, temporary)])
        return True

    def commit(self, temporary: bytes, name: bytes) -> Step[None]:
        """Gives a temporary file its name, or removes it. Raises FileError."""
        path = join(self.path, name)
        try:
            yield from self._sink.rename(temporary, path)
        except AnswerError as error:
            yield from wait_for([self._channel.send(Kind.REMOVE, temporary)])
            self._sink.unfinished.discard(temporary)
            raise (yield from self._explain(path, error)) from error
        self._sink.unfinished.discard(temporary)

    def finish(self, item: Item) -> Step[None]:
        yield from do(self._channel, Kind.SETSTAT, self.path, tail=self._sink.render_attributes(item))

    def close(self) -> Step[None]:
        yield from ()


class GuestWriter:
    """A file in the making. Zeros are not sent: the size at the end makes them a hole."""

    def __init__(self, sink: GuestSink, folder: GuestSinkFolder, name: bytes, temporary: bytes, handle: bytes) -> None:
        self._sink = sink
        self._channel = sink.channel
        self._folder = folder
        self._name = name
        self._temporary = temporary
        self._handle = handle
        self._sent: set[Ticket] = set()
        self._written_to = 0
        self._error: AnswerError | None = None

    @property
    def pending(self) -> int:
        return len(self._sent)

    def has_room(self) -> bool:
        return self._channel.window.has_room()

    def put(self, offset: int, data: Piece) -> None:
        if not data[0] and bytes(data) == ZEROS[: len(data)]:
            return
        self._written_to = max(self._written_to, offset + len(data))
        tail = offset.to_bytes(8, "big")
        whole = memoryview(data)
        self._sent.add(self._channel.send(Kind.WRITE, self._handle, tail=tail, data=whole))

    def receive(self, arrival: Arrival) -> None:
        if arrival[0] in self._sent:
            self._sent.discard(arrival[0])
            try:
                check_done(arrival[1])
            except AnswerError as error:
                self._error = self._error or error

    def check(self) -> Step[None]:
        """Raises FileError or FullError after a failed write."""
        if self._error is not None:
            raise (yield from explain_write(self._channel, self._folder.path, self._error))

    def finish(self, item: Item, size: int) -> Step[None]:
        yield from self.check()
        attributes = self._sink.render_attributes(item, size if self._written_to < size else None)
        # A server carries out requests for one file in their order.
        tickets = [self._channel.send(Kind.FSETSTAT, self._handle, tail=attributes)]
        if self._sink.keep.fsync and wire.FSYNC in self._channel.extensions:
            tickets.append(self._channel.send(Kind.EXTENDED, wire.FSYNC, self._handle))
        tickets.append(self._channel.send(Kind.CLOSE, self._handle))
        self._handle = b""
        replies = yield from wait_for(tickets)
        for reply in replies:
            try:
                check_done(reply)
            except AnswerError as error:
                raise (yield from explain_write(self._channel, self._folder.path, error)) from error
        yield from self._folder.commit(self._temporary, self._name)

    def drop(self) -> Step[None]:
        tickets = [self._channel.send(Kind.CLOSE, self._handle)] if self._handle else []
        if self._temporary in self._sink.unfinished:
            tickets.append(self._channel.send(Kind.REMOVE, self._temporary))
        yield from wait_for(tickets)
        self._sink.unfinished.discard(self._temporary)
