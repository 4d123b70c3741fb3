"""The guest as a source: reads its directories and files by SFTP, many requests at a time."""

import os
from collections.abc import Sequence

from vmkit.copy.calls import ask, check_done, make_item, wait_for
from vmkit.copy.connection import Ticket
from vmkit.copy.engine import Arrival, Channel, Step
from vmkit.copy.items import CHANGED, PAGE_BYTES_MAX, FileError, Item, ItemKind, Piece, WholeReader, join_path
from vmkit.copy.wire import (
    OPEN_READ,
    PATH_BYTES_MAX,
    READ_FILE,
    READ_FOLDER,
    WHOLE_BYTES_MAX,
    XATTRS,
    Code,
    Cursor,
    DataReply,
    ExtendedReply,
    FileAttributes,
    HandleReply,
    Kind,
    NamesReply,
    SftpError,
    StatusReply,
    Xattrs,
    check_name,
    pack_attributes,
)
from vmkit.copy.xattrs import check_xattrs

# A directory of more is a guest's that sends names without an end.
NAMES_MAX = 1_000_000
# The end of data, before it is known.
UNKNOWN = 1 << 64
# Requests for one listing at once. An answer has some hundred names.
READDIRS_MAX = 8
# What an answer to read-folder has, about.
FOLDER_BYTES = 128 << 10
# Answers to requests under way come on top: READDIRS_MAX for each directory that is read.
AHEAD_BYTES_MAX = 4 << 20


def join(folder: bytes, name: bytes) -> bytes:
    """Returns a path of the guest. Raises FileError for one that is too long, as trees without an end have."""
    path = join_path(folder, name)
    if len(path) >= PATH_BYTES_MAX:
        raise FileError(f"the path has more than {PATH_BYTES_MAX - 1} bytes")
    return path


class Ahead:
    """Data of small files that came with their names, and is not written yet."""

    def __init__(self) -> None:
        self.size_bytes = 0


class GuestFolder:
    """A directory of the guest, by its path. It is open once read_batch() has begun, until its end."""

    def __init__(self, channel: Channel, path: bytes, ahead: "Ahead | None" = None) -> None:
        """ahead: what all directories of one tree share."""
        self._channel = channel
        self.path = path
        self._ahead = Ahead() if ahead is None else ahead
        self._whole: dict[bytes, WholeReader] = {}
        self._handle: HandleReply | None = None
        self._seen: set[bytes] = set()
        # READDIRs of the next batch.
        self._asked = 2

    def describe(self, name: bytes) -> str:
        return render_path(self._channel, self.path, name)

    def open_folder(self, name: bytes) -> "Step[GuestFolder]":
        folder = GuestFolder(self._channel, join(self.path, name), self._ahead)
        folder._handle = yield from ask(self._channel, HandleReply, Kind.OPENDIR, folder.path)
        return folder

    def read_batch(self, *, with_data: bool = False) -> Step[list[tuple[bytes, Item]]]:
        found: list[tuple[bytes, Item]] = []
        while not found and self._handle is not None:
            # Data that came along waits until its file's turn. While much waits, a listing has names alone.
            with_data &= READ_FOLDER in self._channel.extensions and self._ahead.size_bytes < AHEAD_BYTES_MAX
            # The server lists on while the first names are read. A small directory and its end come in one exchange.
            tickets = [self._ask_for_names(self._handle.value, with_data=with_data) for _ in range(self._asked)]
            self._asked = min(self._asked * 2, READDIRS_MAX)
            for reply in (yield from wait_for(tickets)):
                if isinstance(reply, NamesReply):
                    self._take_names([(name, attributes, None) for name, attributes in reply.names], found)
                elif isinstance(reply, ExtendedReply):
                    self._take_names(Cursor(reply.body).take_contents(), found)
                elif isinstance(reply, StatusReply) and reply.code == Code.EOF:
                    yield from self.close()
                    break
                else:
                    check_done(reply)
                    raise SftpError("the guest's SFTP server answered READDIR with success and no names")
        return found

    def _ask_for_names(self, handle: bytes, *, with_data: bool) -> Ticket:
        if with_data:
            return self._channel.send(Kind.EXTENDED, READ_FOLDER, handle, size_bytes=FOLDER_BYTES)
        return self._channel.send(Kind.READDIR, handle)

    def _take_names(
        self, names: Sequence[tuple[bytes, FileAttributes, memoryview | None]], found: list[tuple[bytes, Item]]
    ) -> None:
        if not names:
            raise SftpError("the guest's SFTP server sent a listing without names, and not its end")
        for name, attributes, data in names:
            if name in self._seen or len(self._seen) >= NAMES_MAX:
                where = self.describe(b".")
                raise SftpError(f"the guest's SFTP server sends a listing of {where} without an end")
            self._seen.add(name)
            if name in (b".", b".."):
                continue
            item = make_item(attributes)
            found.append((check_name(name), item))
            if data is not None:
                if item.kind != ItemKind.FILE or not item.size == len(data) <= WHOLE_BYTES_MAX:
                    what = f"a file of {item.size} bytes, which is a {item.kind}"
                    raise SftpError(f"the guest's SFTP server sent {len(data)} bytes for {what}")
                # Of its own: the packet is much larger.
                self._whole[name] = WholeReader(item, bytes(data), is_of_guest=True)
                self._ahead.size_bytes += item.size

    def open_reader(self, name: bytes, item: Item, chunk_bytes: int) -> "Step[GuestReader | WholeReader]":
        ready = self._whole.pop(name, None)
        if ready is not None:
            self._ahead.size_bytes -= ready.end
            return ready
        path = join(self.path, name)
        if READ_FILE in self._channel.extensions and item.size <= WHOLE_BYTES_MAX:
            whole = yield from self._read_whole(path, item)
            if whole is not None:
                return whole
        tail = OPEN_READ.to_bytes(4, "big") + pack_attributes(FileAttributes())
        handle = yield from ask(self._channel, HandleReply, Kind.OPEN, path, tail=tail)
        reader = GuestReader(self._channel, handle.value, item, min(chunk_bytes, self._channel.limits.read_bytes))
        if item.size >= reader.chunk_bytes:
            # It is read in several pieces, so it must be the same file from the first to the last.
            yield from reader.refresh()
        return reader

    def _read_whole(self, path: bytes, item: Item) -> Step[WholeReader | None]:
        """Reads a small file in one exchange; None where it is not what it seems, and OPEN finds out."""
        ticket = self._channel.send(Kind.EXTENDED, READ_FILE, path, size_bytes=item.size)
        (reply,) = yield from wait_for([ticket])
        if not isinstance(reply, ExtendedReply):
            return None
        cursor = Cursor(reply.body)
        found, data = make_item(cursor.take_attributes()), cursor.take_view()
        # A file of /proc has more data than its size, and one that is being written may have, too.
        is_whole = found.kind == ItemKind.FILE and found.size == len(data) <= WHOLE_BYTES_MAX
        return WholeReader(found, data, is_of_guest=True) if is_whole else None

    def read_xattrs(self, name: bytes) -> Step[Xattrs]:
        path = join(self.path, name)
        reply = yield from ask(self._channel, ExtendedReply, Kind.EXTENDED, XATTRS, path)
        return check_xattrs(Cursor(reply.body).take_attributes().xattrs)

    def read_link(self, name: bytes) -> Step[bytes]:
        names = (yield from ask(self._channel, NamesReply, Kind.READLINK, join(self.path, name))).names
        if len(names) != 1 or not names[0][0] or b"\0" in names[0][0]:
            raise SftpError("the guest's SFTP server answered READLINK without one path")
        return names[0][0]

    def close(self) -> Step[None]:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            yield from wait_for([self._channel.send(Kind.CLOSE, handle.value)])


def render_path(channel: Channel, folder: bytes, name: bytes) -> str:
    """Returns a path of a guest as the command line takes it."""
    return f"{channel.label}:{os.fsdecode(join_path(folder, name))}"


class GuestReader:
    """A file of the guest. The reads ask for full pieces up to and beyond its end, so growth shows in the last one.

    Files of /proc have the size 0 and data: they are read in order. Those of /sys have a larger size than data.
    """

    def __init__(self, channel: Channel, handle: bytes, item: Item, chunk_bytes: int) -> None:
        self.item = item
        self.chunk_bytes = chunk_bytes
        self._channel = channel
        self._handle = handle
        self._asked: dict[Ticket, int] = {}
        # Pieces that came short, to be asked for again.
        self._again: list[tuple[int, int]] = []
        self._arrived: list[tuple[int, Piece]] = []
        self._next = 0
        self._reached = 0
        self._ends_at = UNKNOWN

    @property
    def end(self) -> int:
        return self._reached

    @property
    def pending(self) -> int:
        return len(self._asked)

    @property
    def can_ask(self) -> bool:
        if self._again:
            return True
        if self._is_streaming:
            return self._ends_at == UNKNOWN and not self._asked
        return self._next <= self.item.size and self._ends_at == UNKNOWN

    @property
    def _is_streaming(self) -> bool:
        return not self.item.size

    def has_room(self) -> bool:
        return self._channel.window.has_room()

    def refresh(self) -> Step[None]:
        """Takes the metadata of the open file in place of the listing's."""
        self.item = make_item((yield from ask(self._channel, FileAttributes, Kind.FSTAT, self._handle)))

    def ask(self) -> None:
        if self._again:
            offset, size = self._again.pop()
        else:
            offset, size = (self._reached if self._is_streaming else self._next), self.chunk_bytes
            self._next = offset + size
        tail = offset.to_bytes(8, "big") + size.to_bytes(4, "big")
        self._asked[self._channel.send(Kind.READ, self._handle, tail=tail, size_bytes=size)] = offset

    def take(self) -> list[tuple[int, Piece]]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def receive(self, arrival: Arrival) -> bool:
        ticket, reply = arrival
        offset = self._asked.pop(ticket, None)
        if offset is None:
            return False
        if isinstance(reply, DataReply):
            count = len(reply.view)
            end = offset + count
            self._reached = max(self._reached, end)
            self._arrived.append((offset, reply.view))
            if not self._is_streaming and count < ticket.size_bytes and end != self.item.size:
                self._again.append((end, ticket.size_bytes - count))
        elif isinstance(reply, StatusReply) and reply.code == Code.EOF:
            self._ends_at = min(self._ends_at, offset)
        else:
            check_done(reply)
            raise SftpError("the guest's SFTP server answered READ with success and no data")
        return True

    def finish(self) -> Step[None]:
        is_odd = self._reached != self.item.size
        if self._reached > self._ends_at:
            raise FileError(CHANGED)
        if is_odd or self.item.size >= self.chunk_bytes:
            before = self.item
            yield from self.refresh()
            is_same = (self.item.size, self.item.mtime_ns) == (before.size, before.mtime_ns)
            # A file in one piece is whole when its size is that of the piece.
            is_whole = self._reached == self.item.size and max(self._reached, before.size) < self.chunk_bytes
            has_no_size = self._ends_at != UNKNOWN and self.item.size <= PAGE_BYTES_MAX
            if not is_whole and not (is_same and (has_no_size or not is_odd)):
                raise FileError(CHANGED)
        yield from self.close()

    def close(self) -> Step[None]:
        # The server may give a closed handle's name to another file, so it is closed once.
        if self._handle:
            handle, self._handle = self._handle, b""
            # An error of CLOSE changes nothing: the data is here.
            yield from wait_for([self._channel.send(Kind.CLOSE, handle)])
