"""Lays archives over each other in memory: names, kinds, modes, owners, times and attributes become a Tree.

Contents stay in the archives. Nothing is written to the host's file system, no device is made there, and no link is
followed but inside of the tree. Whiteouts are those of the OCI image specification (layer.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vmkit.errors import BuildError
from vmkit.image.formats.tree import FileKind, Node, Tree, encode_name
from vmkit.roots.extents import Extent
from vmkit.roots.limits import Budget
from vmkit.roots.members import MemberKind, Run, TarMember, read_members

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
# Other files of this prefix are an old overlay's own.
_MARKS = ".wh..wh."
_KINDS = {
    MemberKind.FILE: FileKind.FILE,
    MemberKind.DIRECTORY: FileKind.DIRECTORY,
    MemberKind.SYMLINK: FileKind.SYMLINK,
    MemberKind.CHARACTER: FileKind.CHARACTER,
    MemberKind.BLOCK: FileKind.BLOCK,
    MemberKind.FIFO: FileKind.FIFO,
}
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class SparseContent:
    """A file with holes: the runs of its content follow each other in the archive."""

    extent: Extent
    runs: tuple[Run, ...]
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        end, taken = 0, 0
        for at, length in self.runs:
            yield from _make_zeros(at - end)
            yield from Extent(self.extent.file, self.extent.offset + taken, length).chunks()
            end, taken = at + length, taken + length
        yield from _make_zeros(self.size_bytes - end)


def _make_zeros(length: int) -> Iterator[bytes]:
    while length:
        piece = _ZEROS[:length]
        length -= len(piece)
        yield piece


def add_archive(tree: Tree, archive: Extent, name: str, budget: Budget) -> None:
    """Lays a plain tar over the tree. name: the archive's, for errors. Raises BuildError."""
    for member in read_members(archive.read, name=name, has_end=True):
        budget.take_entry(member.size_bytes)
        _put(tree, archive, member, name)


def add_layer(tree: Tree, archive: Extent, name: str, budget: Budget) -> None:
    """Lays a layer of a container image over the tree: first it takes away, and then it puts. Raises BuildError.

    A whiteout is for the layers below alone, wherever it stands in its own.
    """
    members = []
    for member in read_members(archive.read, name=name):
        budget.take_entry(member.size_bytes)
        folder, _, base = member.path.rpartition("/")
        if base == _OPAQUE:
            tree.empty(folder)
        elif base.startswith(_MARKS):
            continue
        elif base.startswith(_WHITEOUT):
            gone = base.removeprefix(_WHITEOUT)
            if gone in ("", ".", ".."):
                raise BuildError(f"{name} is damaged: the whiteout '{member.path}' names no file")
            tree.discard(f"{folder}/{gone}")
        else:
            members.append(member)
    for member in members:
        _put(tree, archive, member, name)


def _put(tree: Tree, archive: Extent, member: TarMember, name: str) -> None:
    if not member.path:
        # The root itself: ext4 has one already.
        return
    try:
        tree.put(member.path, _make_node(tree, archive, member))
    except BuildError as error:
        raise BuildError(f"{name} is damaged: {error.brief}", hint=error.hint) from error


def _make_node(tree: Tree, archive: Extent, member: TarMember) -> Node:
    if member.kind is MemberKind.HARD_LINK:
        known = tree.look_up(member.link)
        if known is None or known.kind is FileKind.DIRECTORY:
            raise BuildError(f"'{member.path}' is a hard link to '{member.link}', which is no file before it")
        return known
    content: Extent | SparseContent | None = None
    if member.kind is MemberKind.FILE and member.size_bytes:
        content = Extent(archive.file, archive.offset + member.offset, member.size_bytes)
        if member.runs is not None:
            content = SparseContent(content, member.runs, member.size_bytes)
    return Node(
        _KINDS[member.kind],
        0o777 if member.kind is MemberKind.SYMLINK else member.mode,
        encode_name(member.link) if member.kind is MemberKind.SYMLINK else b"",
        member.uid,
        member.gid,
        member.device,
        member.mtime_s,
        content,
        # A symlink's attributes are the host's labels.
        () if member.kind is MemberKind.SYMLINK else member.xattrs,
    )
