"""Requests to a guest as steps: one request and its reply, and what a refusal of the server means."""

from collections.abc import Iterable
from typing import TypeVar

from vmkit.copy import wire
from vmkit.copy.connection import Ticket
from vmkit.copy.engine import Channel, Step
from vmkit.copy.items import KINDS, SIZE_BYTES_MAX, FileError, FullError, Item, ItemKind
from vmkit.copy.wire import (
    Code,
    ExtendedReply,
    FileAttributes,
    Kind,
    NamesReply,
    Reply,
    SftpError,
    StatusReply,
    VersionReply,
)
from vsh.text import clean_line

Answer = TypeVar("Answer", bound=Reply)
GREETING_S = 30.0
# In the words of the kernel, which users know.
TEXTS = {
    Code.NO_SUCH_FILE: "No such file or directory",
    Code.PERMISSION_DENIED: "Permission denied",
    Code.UNSUPPORTED: "the guest's SFTP server does not support it",
}
# Texts of servers that say nothing.
EMPTY = ("", "failure", "error")


class AnswerError(FileError):
    """The server answered a request with an error."""

    def __init__(self, status: StatusReply) -> None:
        super().__init__(_render(status))
        self.code = status.code
        self.is_plain = status.code == Code.FAILURE and clean_line(status.message).lower() in EMPTY


def _render(status: StatusReply) -> str:
    if status.code in TEXTS:
        return TEXTS[Code(status.code)]
    text = clean_line(status.message)
    return f"the guest refused it: {text}" if text else f"the guest refused it with status {status.code}"


def wait_for(tickets: Iterable[Ticket]) -> Step[list[Reply]]:
    """Waits for the replies to these requests. Drops replies to others, which an error has left."""
    found: dict[Ticket, Reply] = {}
    order = list(tickets)
    while len(found) < len(order):
        arrival = yield None
        if arrival is not None and arrival[0] in order:
            found[arrival[0]] = arrival[1]
    return [found[ticket] for ticket in order]


def check_done(reply: Reply) -> None:
    """Raises AnswerError unless a request was carried out."""
    if isinstance(reply, StatusReply) and reply.code != Code.OK:
        raise AnswerError(reply)


def do(channel: Channel, kind: Kind, *texts: bytes, tail: bytes = b"") -> Step[None]:
    """Sends a request without an answer of its own. Raises AnswerError."""
    for reply in (yield from wait_for([channel.send(kind, *texts, tail=tail)])):
        check_done(reply)


def ask(channel: Channel, answer: type[Answer], kind: Kind, *texts: bytes, tail: bytes = b"") -> Step[Answer]:
    """Sends a request and returns its answer. Raises AnswerError."""
    for reply in (yield from wait_for([channel.send(kind, *texts, tail=tail)])):
        if isinstance(reply, answer):
            return reply
        check_done(reply)
    raise SftpError(f"the guest's SFTP server answered {kind.name} with success and no answer")


def start_channel(channel: Channel) -> Step[None]:
    """Greets the server and asks for its limits. Raises SftpError."""
    (version,) = yield from wait_for([channel.send_init()])
    if not isinstance(version, VersionReply):
        raise SftpError("the guest's SFTP server did not greet")
    channel.extensions = version.extensions
    if wire.LIMITS in channel.extensions:
        answer = yield from ask(channel, ExtendedReply, Kind.EXTENDED, wire.LIMITS)
        channel.limits = wire.parse_limits(answer.body)


def find_real_path(channel: Channel, path: bytes) -> Step[bytes]:
    """Returns a path without links. Raises AnswerError, SftpError."""
    names = (yield from ask(channel, NamesReply, Kind.REALPATH, path)).names
    if len(names) != 1 or not names[0][0].startswith(b"/"):
        raise SftpError("the guest's SFTP server answered REALPATH without one absolute path")
    return names[0][0]


def find_item(channel: Channel, path: bytes, *, follow: bool) -> Step[Item | None]:
    """Returns a file's metadata; None where no file is. Raises AnswerError."""
    try:
        attributes = yield from ask(channel, FileAttributes, Kind.STAT if follow else Kind.LSTAT, path)
    except AnswerError as error:
        if error.code == Code.NO_SUCH_FILE:
            return None
        raise
    return make_item(attributes)


def make_item(attributes: FileAttributes) -> Item:
    """Returns attributes as an item. A server that gives no mode gives no kind either."""
    mode, size = attributes.mode or 0, attributes.size or 0
    kind = KINDS.get(mode & 0o170000, ItemKind.OTHER)
    if size > SIZE_BYTES_MAX:
        raise SftpError(f"the guest's SFTP server sent a size of {size} bytes")
    atime, mtime = attributes.atime_s or 0, attributes.mtime_s or 0
    return Item(kind, size, mode & 0o7777, atime * 10**9, mtime * 10**9, attributes.uid, attributes.gid, identity=None)


def explain_write(channel: Channel, folder: bytes, error: AnswerError) -> Step[FileError | FullError]:
    """Finds out why a server that says only `Failure` cannot write to a directory: it is full, or read-only."""
    if error.is_plain and wire.STATVFS in channel.extensions:
        try:
            room = wire.parse_room((yield from ask(channel, ExtendedReply, Kind.EXTENDED, wire.STATVFS, folder)).body)
        except AnswerError:
            return error
        if room.is_read_only:
            return FileError("Read-only file system")
        if not room.free_blocks or (room.files and not room.free_files):
            return FullError("No space left on device")
    elif "no space left" in error.brief.lower() or "quota exceeded" in error.brief.lower():
        return FullError(error.brief)
    return error
