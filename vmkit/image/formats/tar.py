"""A tar's members as nodes, read once from front to back: of a package's content, or of an installed root.

A damaged tar, or a hostile one, is a BuildError: its sizes, owners, times and names are checked before they are used.
No member is read that is larger than a guest's tree may be.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, Self, TypeVar

from vmkit.errors import BuildError
from vmkit.image.formats.tree import MTIME_S, PATH_LIMIT_BYTES, TREE_LIMIT_BYTES, FileKind, Node, normalise_path

# tarfile copies what is left of a block for each header it reads.
_BLOCK_BYTES = 32 << 10
# tarfile reads a long name or a set of extended fields (pax(1)) into memory before it is a member.
_EXTENSION_LIMIT_BYTES = 1 << 20
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Owners are 32 bits in the kernel (2^32-1 means none), times in an initramfs.
_OWNER_LIMIT, _TIME_LIMIT_S = (1 << 32) - 1, 1 << 32

_AnyMember = TypeVar("_AnyMember", bound=tarfile.TarInfo)


class _Member(tarfile.TarInfo):
    """A header that is refused where tarfile would take the archive's end for it, or read all that it claims."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        return cls._check(lambda: super(_Member, cls).frombuf(buf, encoding, errors))

    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> Self:
        """What tarfile calls instead since its security update of 2026 (Debian 13's 3.13.5, among others)."""
        return cls._check(lambda: super(_Member, cls)._frombuf(buf, encoding, errors, **options))  # type: ignore[misc,no-any-return]  # typeshed lacks it

    @staticmethod
    def _check(read: Callable[[], _AnyMember]) -> _AnyMember:
        try:
            member = read()
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]  # typeshed lacks both
            raise tarfile.ReadError(str(error)) from error
        if member.type in _EXTENSIONS and not 0 <= member.size <= _EXTENSION_LIMIT_BYTES:
            raise tarfile.ReadError(f"a header claims {member.size} bytes")
        return member


def read_tar(stream: BinaryIO, *, keep_time: bool = False) -> Iterator[tuple[str, Node]]:
    """Every file, directory and symlink, as normalised path and node; a hard link becomes a copy.

    Times are MTIME_S unless keep_time. Raises BuildError for a damaged archive.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK_BYTES, tarinfo=_Member) as tar:
            yield from _TarReader(tar, keep_time=keep_time).read()
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise BuildError(f"the tar archive is damaged: {error}") from error


class _TarReader:
    def __init__(self, tar: tarfile.TarFile, *, keep_time: bool) -> None:
        self._tar = tar
        self._keep_time = keep_time
        # What hard links may name. The nodes are those that were handed out: a reference each.
        self._files: dict[str, Node] = {}
        self._size_bytes = 0

    def read(self) -> Iterator[tuple[str, Node]]:
        for member in self._tar:
            for text in (member.name, member.linkname):
                if "\0" in text or not _is_utf8(text):
                    raise BuildError(f"the tar archive holds a name that is not UTF-8 text: {text!r}")
            path = normalise_path(member.name)
            node = self._read_node(member)
            if node is None:
                continue
            if node.kind is FileKind.FILE:
                self._files[path] = node
            yield path, node

    def _read_node(self, member: tarfile.TarInfo) -> Node | None:
        """None for what is neither file, directory nor symlink.

        Debian's policy forbids device nodes in packages; a FIFO or a socket has no use in an image.
        """
        mode, uid, gid = member.mode & 0o7777, member.uid, member.gid
        mtime_s = int(member.mtime) if self._keep_time else MTIME_S
        if not (0 <= uid < _OWNER_LIMIT and 0 <= gid < _OWNER_LIMIT and 0 <= mtime_s < _TIME_LIMIT_S):
            raise BuildError(f"'{member.name}' has an owner or a time that no file has: {uid}, {gid}, {mtime_s}")
        if member.isdir():
            return Node(FileKind.DIRECTORY, mode, uid=uid, gid=gid, mtime_s=mtime_s)
        if member.issym():
            target = member.linkname.encode()
            if not 0 < len(target) <= PATH_LIMIT_BYTES:
                raise BuildError(f"the symlink '{member.name}' has a target of {len(target)} bytes")
            return Node(FileKind.SYMLINK, 0o777, target, uid, gid, mtime_s=mtime_s)
        if member.isreg():
            return Node(FileKind.FILE, mode, self._read_data(member), uid, gid, mtime_s=mtime_s)
        if member.islnk():
            known = self._files.get(normalise_path(member.linkname))
            if known is None:
                raise BuildError(f"'{member.name}' is a hard link to '{member.linkname}', which is not before it")
            return Node(FileKind.FILE, mode, known.data, uid, gid, mtime_s=mtime_s)
        return None

    def _read_data(self, member: tarfile.TarInfo) -> bytes:
        self._size_bytes += member.size
        if not 0 <= member.size <= self._size_bytes <= TREE_LIMIT_BYTES:
            raise BuildError(f"the tar archive holds more than {TREE_LIMIT_BYTES >> 20} MiB at '{member.name}'")
        source = self._tar.extractfile(member)
        data = source.read() if source else b""
        if len(data) != member.size:
            raise BuildError(f"the tar archive ends inside '{member.name}'")
        return data


def _is_utf8(text: str) -> bool:
    """False for a name whose bytes were not; tarfile keeps those as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
