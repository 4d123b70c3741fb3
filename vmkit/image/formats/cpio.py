"""Reproducible `newc` archives: the same tree gives the same bytes, on any host, for any user.

The format is the one of Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources. Owners and
device nodes are fields of the archive, so nothing here needs root. The reader exists for tests and for looking into an
artifact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vmkit.errors import BuildError
from vmkit.image.formats.tree import FileKind, Node, Tree, encode_name

_MAGIC = b"070701"
_HEADER_BYTES = 110
_TRAILER = "TRAILER!!!"
# Every field is eight hexadecimal digits.
_FIELD_LIMIT = 1 << 32
# GNU cpio pads to 512; the kernel ignores zeros after the trailer.
_BLOCK_BYTES = 512
_TYPE_BITS = {
    FileKind.FILE: 0o100000,
    FileKind.DIRECTORY: 0o040000,
    FileKind.SYMLINK: 0o120000,
    FileKind.CHARACTER: 0o020000,
    FileKind.BLOCK: 0o060000,
    FileKind.FIFO: 0o010000,
}
_KINDS = {bits: kind for kind, bits in _TYPE_BITS.items()}


# The kernel's own root is open to every user, like /tmp: the archive sets its owner and mode.
ROOT_PATH = "."
_ROOT = Node(FileKind.DIRECTORY, 0o755)


def render_cpio(tree: Tree) -> bytes:
    """The tree as one archive, its root first. Inode numbers count up from 1 in path order; times are the nodes'."""
    out = bytearray()
    for inode, (path, node) in enumerate([(ROOT_PATH, _ROOT), *tree.walk()], start=1):
        _append(out, path, node, inode)
    _append(out, _TRAILER, Node(FileKind.FILE, 0, mtime_s=0), 0, links=1, mode=0)
    _pad(out, _BLOCK_BYTES)
    return bytes(out)


def _append(
    out: bytearray,
    path: str,
    node: Node,
    inode: int,
    *,
    links: int | None = None,
    mode: int | None = None,
) -> None:
    name = encode_name(path) + b"\0"
    if node.size_bytes >= _FIELD_LIMIT:
        raise BuildError(f"'/{path}' is too large for an initramfs: {node.size_bytes} bytes")
    fields = (
        inode,
        (_TYPE_BITS[node.kind] | node.mode) if mode is None else mode,
        node.uid,
        node.gid,
        (2 if node.kind is FileKind.DIRECTORY else 1) if links is None else links,
        node.mtime_s,
        node.size_bytes,
        0,
        0,
        *node.device,
        len(name),
        0,
    )
    out += _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    _pad(out, 4)
    for chunk in node.chunks():
        out += chunk
    _pad(out, 4)


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


@dataclass(frozen=True, slots=True)
class CpioEntry:
    """One entry as it stands in an archive."""

    path: str
    node: Node
    inode: int
    mtime_s: int


def read_cpio(archive: bytes) -> Iterator[CpioEntry]:
    """The entries of an uncompressed newc archive. Raises BuildError where it is not one."""
    offset = 0
    while True:
        header = archive[offset : offset + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES or header[:6] != _MAGIC:
            raise BuildError(f"not a newc archive at offset {offset}")
        fields = [int(header[at : at + 8], 16) for at in range(6, _HEADER_BYTES, 8)]
        inode, mode, uid, gid, _, mtime_s, size, _, _, major, minor, name_size, _ = fields
        start = offset + _HEADER_BYTES
        path = archive[start : start + name_size - 1].decode()
        if path == _TRAILER:
            return
        data_at = start + name_size + -(start + name_size) % 4
        if data_at + size > len(archive):
            raise BuildError(f"the archive ends inside '{path}'")
        data = archive[data_at : data_at + size]
        node = Node(_KINDS[mode & 0o170000], mode & 0o7777, data, uid, gid, (major, minor), mtime_s)
        yield CpioEntry(path, node, inode, mtime_s)
        offset = data_at + size + -(data_at + size) % 4
