"""A Tree as an ext4 file system in a file: no root, no loop device, the same bytes every time.

mke2fs makes it empty and debugfs fills it, so that owners and modes are fields that are set and not files of this host.
It has no journal and no free space: it is mounted read-only, below an overlay. One that guests write to has a
journal, and grows in the guest.
"""

import errno
import itertools
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmkit.errors import BuildError, CommandError
from vmkit.image.formats.tree import FileKind, Node, Tree, decode_name, encode_name
from vmkit.run import run

BLOCK_BYTES = 4096
_INODE_BYTES = 256
# mke2fs's own inodes come before the first of a user's (EXT2_GOOD_OLD_FIRST_INO 11 is lost+found).
_OWN_INODES = 11
# 300 MB take ten seconds.
_TIMEOUT_S = 900.0
_TYPE_BITS = {
    FileKind.FILE: 0o100000,
    FileKind.DIRECTORY: 0o040000,
    FileKind.CHARACTER: 0o020000,
    FileKind.BLOCK: 0o060000,
    FileKind.FIFO: 0o010000,
}
_DEVICES = {FileKind.CHARACTER: "c", FileKind.BLOCK: "b"}
# debugfs reads its commands by lines, of this length at most (BUFSIZ).
_UNWRITABLE = re.compile(r"[\n\r\0]")
_LINE_LIMIT_BYTES = 8000
# Contents wait in files until debugfs has read them: so many bytes at a time, and no second copy of a whole root. The
# files are few and are written again for the next batch: making one takes up to a millisecond.
_BATCH_BYTES = 256 << 20
_BATCH_FILES = 256
# ext4 keeps a file's attributes in one block, beside what fits into the inode.
_XATTR_LIMIT_BYTES = 3072
# Signed 32 bits: the fields that debugfs sets.
_TIME_LIMIT_S = (1 << 31) - 1
_ZEROS = bytes(1 << 20)
# The program's version, each command, and what `write` prints.
_EXPECTED_ANSWERS = ("debugfs ", "debugfs: ", "Allocated inode: ")
_TOLD_CHARACTERS = 1000
# Longer targets are in a block of their own (ext4: i_block is 60 bytes).
_INLINE_LINK_BYTES = 59
# A bitmap is one block.
_GROUP_BLOCKS = BLOCK_BYTES * 8
_JOURNAL_MIB = 32


class _Shape(NamedTuple):
    """What mke2fs makes: its -O, more words, more of its -E; and what there is beside the files."""

    features: str
    words: tuple[str, ...] = ()
    extended: str = ""
    inodes_per_group: int = 0
    free_bytes: int = 0


# Below an overlay in memory nothing is written.
_READ_ONLY = _Shape("none,extent,dir_index,filetype,sparse_super,large_file,huge_file,dir_nlink,extra_isize,ext_attr")
# As Debian's mke2fs has it, but for 64 bits. resize_inode keeps room for the tables of 4 TiB: the guest's kernel makes
# it as large as its disk, and needs no program for that. Inodes are one for 16 KiB, also in the groups to come.
_WRITABLE = _Shape(
    f"{_READ_ONLY.features},has_journal,resize_inode,flex_bg,metadata_csum",
    words=("-J", f"size={_JOURNAL_MIB}"),
    extended=",resize=1073741824,lazy_journal_init=1",
    inodes_per_group=8192,
    free_bytes=(_JOURNAL_MIB + 32) << 20,
)


def write_ext4(tree: Tree, path: Path, work: Path, label: str, *, is_writable: bool = False) -> None:
    """Writes the tree as an ext4 file system to path. work is an empty folder for the files' contents.

    label: what the file system's UUID is made from; equal trees and labels give equal bytes. A node at several paths
    becomes one file with hard links. is_writable: it has a journal, free space and inodes, and grows with its disk.
    Device nodes in /dev are left out: a guest mounts its own. Raises OSError where
    the host's disk is full, BuildError for a tree that ext4 cannot hold.
    """
    nodes = [(name, node) for name, node in tree.walk() if node.kind not in _DEVICES or not name.startswith("dev/")]
    kind = _WRITABLE if is_writable else _READ_ONLY
    inodes, size_bytes = _measure(nodes, kind)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    # libext2fs takes this for the present moment. It is fixed, so the file system does not hold when it was made.
    environ = {"E2FSPROGS_FAKE_TIME": "1", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"vmkit:{label}")
    argv: list[str | Path] = [
        # No mke2fs.conf of the host's decides what is made.
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-I", str(_INODE_BYTES), "-m", "0",
        "-O", kind.features, *kind.words, "-N", str(inodes), "-U", str(identity),
        "-E", f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,nodiscard{kind.extended}", path,
    ]  # fmt: skip
    try:
        run(argv, timeout_s=_TIMEOUT_S, env={**environ, "MKE2FS_CONFIG": "/dev/null"}, package="e2fsprogs")
    except CommandError as error:
        _check_room(error.details, path)
        raise
    script = work / "debugfs.commands"
    # debugfs's status is always 0. It prints failures on stderr, between the commands that it repeats.
    words: list[str | Path] = ["sh", "-c", 'exec debugfs -w -f "$1" "$2" 2>&1', "sh", script, path]
    for batch in _split(nodes):
        script.write_bytes(b"".join(encode_name(f"{line}\n") for line in _render_commands(batch, work)))
        told = run(words, timeout_s=_TIMEOUT_S, env=environ, package="e2fsprogs").decode(errors="replace")
        _check_answers(told, path)
    _check(path, environ)


class _Placed(NamedTuple):
    """A node at one of its paths. links: how many it has in all; 0 at all of them but the first, `first`."""

    name: str
    node: Node
    links: int
    first: str


def _split(nodes: list[tuple[str, Node]]) -> Iterator[list[_Placed]]:
    """The nodes in batches whose contents are few files of _BATCH_BYTES together, or one larger file."""
    counts = Counter(id(node) for _, node in nodes if node.kind is FileKind.FILE)
    firsts: dict[int, str] = {}
    batch: list[_Placed] = []
    size = files = 0
    for name, node in nodes:
        first = firsts.setdefault(id(node), name) if node.kind is FileKind.FILE else name
        placed = _Placed(name, node, counts.get(id(node), 1) if first == name else 0, first)
        if placed.links and (size + node.size_bytes > _BATCH_BYTES or files >= _BATCH_FILES) and batch:
            yield batch
            batch, size, files = [], 0, 0
        batch.append(placed)
        size += node.size_bytes if placed.links else 0
        files += (node.kind is FileKind.FILE and placed.links > 0) + len(node.xattrs)
    yield batch


def _measure(nodes: list[tuple[str, Node]], kind: _Shape) -> tuple[int, int]:
    """The number of inodes, and a size in bytes that the file system is sure to fit in, in whole MiB."""
    blocks = 0
    children: dict[str, int] = {}
    seen: set[int] = set()
    for name, node in nodes:
        folder, _, base = name.rpartition("/")
        # ext4_dir_entry_2: 8 bytes and the name, rounded up to 4; a block is never full to its last byte.
        children[folder] = children.get(folder, 0) + 12 + len(encode_name(base))
        if node.kind is FileKind.FILE:
            # A second name of a file is no second file.
            blocks += 0 if id(node) in seen else -(-node.size_bytes // BLOCK_BYTES) + bool(node.xattrs)
            seen.add(id(node))
            continue
        blocks += bool(node.xattrs)
        if node.kind is FileKind.DIRECTORY or len(node.data) > _INLINE_LINK_BYTES:
            blocks += 1
    blocks += sum(size * 5 // 4 // BLOCK_BYTES for size in children.values())
    blocks += kind.free_bytes // BLOCK_BYTES
    # The inodes' own blocks make at most one group more.
    groups = blocks * 107 // 100 // _GROUP_BLOCKS + 1
    inodes = max(len(nodes) + _OWN_INODES + 1, groups * kind.inodes_per_group)
    inode_blocks = inodes * _INODE_BYTES // BLOCK_BYTES + 1
    # Group descriptors, bitmaps, copies of the superblock, extents of large files: 1 % covers them.
    total = (blocks + inode_blocks) * 101 // 100 + 1024
    return inodes, -(-total * BLOCK_BYTES // (1 << 20)) * (1 << 20)


def _render_commands(nodes: Iterable[_Placed], work: Path) -> Iterator[str]:
    """debugfs(8) commands, and the files they read. `write` knows no path: the folder is entered first."""
    here = ""
    contents = (work / str(number) for number in itertools.count())
    for name, node, links, first in nodes:
        folder, _, base = name.rpartition("/")
        _check_writable(name, node)
        if folder != here:
            yield f"cd {_quote(f'/{folder}')}"
            here = folder
        if not links:
            yield f"ln {_quote(f'/{first}')} {_quote(base)}"
            continue
        if node.kind is FileKind.FILE:
            content = next(contents)
            _write_content(content, node.chunks(), node.size_bytes)
            yield f"write {_quote(str(content))} {_quote(base)}"
        else:
            yield _render_making(_quote(base), node)
        # A name like <2> would be an inode's number.
        word = _quote(f"./{base}" if base.startswith("<") else base)
        if node.kind is not FileKind.SYMLINK:
            yield f"sif {word} mode 0{_TYPE_BITS[node.kind] | node.mode:o}"
        for field, value in (("uid", node.uid), ("gid", node.gid), ("links_count", links if links > 1 else 0)):
            if value:
                yield f"sif {word} {field} {value}"
        yield f"sif {word} mtime @{min(max(node.mtime_s, 0), _TIME_LIMIT_S)}"
        for attribute, data in node.xattrs:
            content = next(contents)
            _write_content(content, [data], len(data))
            yield f"ea_set -f {_quote(str(content))} {word} {_quote(attribute)}"


def _render_making(word: str, node: Node) -> str:
    match node.kind:
        case FileKind.DIRECTORY:
            return f"mkdir {word}"
        case FileKind.SYMLINK:
            return f"symlink {word} {_quote(decode_name(node.data))}"
        case FileKind.FIFO:
            return f"mknod {word} p"
        case _:
            major, minor = node.device
            return f"mknod {word} {_DEVICES[node.kind]} {major} {minor}"


def _check_writable(name: str, node: Node) -> None:
    texts = [name, decode_name(node.data) if node.kind is FileKind.SYMLINK else "", *(key for key, _ in node.xattrs)]
    if any(_UNWRITABLE.search(text) or len(encode_name(text)) * 2 > _LINE_LIMIT_BYTES for text in texts):
        raise BuildError(f"cannot put '/{name}' on a disk: its name or target has a line break, or is too long")
    if sum(len(key) + len(data) + 16 for key, data in node.xattrs) > _XATTR_LIMIT_BYTES:
        raise BuildError(f"cannot put '/{name}' on a disk: its extended attributes are larger than ext4 allows")


def _quote(text: str) -> str:
    """A word of debugfs's command line: a quote in it is doubled (libss)."""
    return '"' + text.replace('"', '""') + '"'


def _write_content(path: Path, chunks: Iterable[bytes], size_bytes: int) -> None:
    """Writes a content over what the file holds; a large one with holes where it is zeros, which debugfs keeps."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:  # noqa: PTH123
        if size_bytes > len(_ZEROS):
            # For small ones it would cost more than it saves: a file that was emptied is synced when it is closed
            # (auto_da_alloc in ext4(5)).
            file.truncate(0)
        for chunk in chunks:
            if size_bytes > len(_ZEROS) and chunk == _ZEROS[: len(chunk)]:
                file.seek(len(chunk), os.SEEK_CUR)
            else:
                file.write(chunk)
        file.truncate(size_bytes)


def _check_room(told: str, path: Path) -> None:
    """Raises OSError when a program found the host's disk full; of a full ext4 it has other words."""
    if os.strerror(errno.ENOSPC) in told:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _check_answers(told: str, path: Path) -> None:
    for line in told.splitlines():
        if not line.startswith(_EXPECTED_ANSWERS):
            _check_room(line, path)
            raise BuildError(f"debugfs cannot write the root file system: {line}", details=told[-_TOLD_CHARACTERS:])


def _check(path: Path, environ: dict[str, str]) -> None:
    try:
        run(["e2fsck", "-f", "-n", path], timeout_s=_TIMEOUT_S, env=environ, package="e2fsprogs")
    except CommandError as error:
        raise BuildError("e2fsck found faults in the file system that vmkit wrote", details=error.details) from error
