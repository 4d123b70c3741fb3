"""A Tree as an ext4 file system in a file: no root, no loop device, the same bytes every time.

mke2fs makes it empty and debugfs fills it, so that owners and modes are fields that are set and not files of this host.
It has no journal and no free space: it is mounted read-only, below an overlay.
"""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from vmkit.errors import BuildError, CommandError
from vmkit.image.formats.tree import FileKind, Node, Tree
from vmkit.run import run

BLOCK_BYTES = 4096
_INODE_BYTES = 256
# mke2fs's own inodes come before the first of a user's (EXT2_GOOD_OLD_FIRST_INO 11 is lost+found).
_OWN_INODES = 11
# 300 MB take ten seconds.
_TIMEOUT_S = 900.0
_TYPE_BITS = {FileKind.FILE: 0o100000, FileKind.DIRECTORY: 0o040000}
# A name that debugfs's command line cannot hold between two quotes.
_UNQUOTABLE = re.compile(r'["\n\0]')
# The program's version, each command, and what `write` prints.
_EXPECTED_ANSWERS = ("debugfs ", "debugfs: ", "Allocated inode: ")
_TOLD_CHARACTERS = 1000
# Longer targets are in a block of their own (ext4: i_block is 60 bytes).
_INLINE_LINK_BYTES = 59


def write_ext4(tree: Tree, path: Path, work: Path, label: str) -> None:
    """Writes the tree as an ext4 file system to path. work is an empty folder for the files' contents.

    label: what the file system's UUID is made from; equal trees and labels give equal bytes. Device nodes are left
    out: a guest mounts its own /dev.
    """
    nodes = [(name, node) for name, node in tree.walk() if node.kind is not FileKind.CHARACTER]
    size_bytes = _measure(nodes)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    # libext2fs takes this for the present moment. It is fixed, so the file system does not hold when it was made.
    environ = {"E2FSPROGS_FAKE_TIME": "1", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"vmkit:{label}")
    argv: list[str | Path] = [
        # No mke2fs.conf of the host's decides what is made.
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-I", str(_INODE_BYTES), "-m", "0",
        "-O", "none,extent,dir_index,filetype,sparse_super,large_file,huge_file,dir_nlink,extra_isize,ext_attr",
        "-N", str(len(nodes) + _OWN_INODES + 1), "-U", str(identity),
        "-E", f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,nodiscard", path,
    ]  # fmt: skip
    run(argv, timeout_s=_TIMEOUT_S, env={**environ, "MKE2FS_CONFIG": "/dev/null"}, package="e2fsprogs")
    script = work / "debugfs.commands"
    script.write_text("".join(f"{line}\n" for line in _render_commands(nodes, work)))
    # debugfs's status is always 0. It prints failures on stderr, between the commands that it repeats.
    words: list[str | Path] = ["sh", "-c", 'exec debugfs -w -f "$1" "$2" 2>&1', "sh", script, path]
    _check_answers(run(words, timeout_s=_TIMEOUT_S, env=environ, package="e2fsprogs").decode(errors="replace"))
    _check(path, environ)


def _measure(nodes: list[tuple[str, Node]]) -> int:
    """A size in bytes that the file system is sure to fit in, in whole MiB."""
    blocks = 0
    children: dict[str, int] = {}
    for name, node in nodes:
        folder, _, base = name.rpartition("/")
        # ext4_dir_entry_2: 8 bytes and the name, rounded up to 4; a block is never full to its last byte.
        children[folder] = children.get(folder, 0) + 12 + len(base.encode())
        if node.kind is FileKind.FILE or (node.kind is FileKind.SYMLINK and len(node.data) > _INLINE_LINK_BYTES):
            blocks += -(-len(node.data) // BLOCK_BYTES)
        elif node.kind is FileKind.DIRECTORY:
            blocks += 1
    blocks += sum(size * 5 // 4 // BLOCK_BYTES for size in children.values())
    inode_blocks = (len(nodes) + _OWN_INODES + 1) * _INODE_BYTES // BLOCK_BYTES + 1
    # Group descriptors, bitmaps, copies of the superblock, extents of large files: 1 % covers them.
    total = (blocks + inode_blocks) * 101 // 100 + 1024
    return -(-total * BLOCK_BYTES // (1 << 20)) * (1 << 20)


def _render_commands(nodes: list[tuple[str, Node]], work: Path) -> Iterator[str]:
    """debugfs(8) commands, and the files they read. `write` knows no path: the folder is entered first."""
    here = ""
    for number, (name, node) in enumerate(nodes):
        folder, _, base = name.rpartition("/")
        if _UNQUOTABLE.search(name) or (node.kind is FileKind.SYMLINK and _UNQUOTABLE.search(_target(node))):
            raise BuildError(f"cannot put '/{name}' on a disk: its name or target has a quote or a newline")
        if folder != here:
            yield f'cd "/{folder}"'
            here = folder
        match node.kind:
            case FileKind.DIRECTORY:
                yield f'mkdir "{base}"'
            case FileKind.SYMLINK:
                yield f'symlink "{base}" "{_target(node)}"'
            case _:
                content = work / str(number)
                content.write_bytes(node.data)
                yield f'write "{content}" "{base}"'
        if node.kind is not FileKind.SYMLINK:
            yield f'sif "{base}" mode 0{_TYPE_BITS[node.kind] | node.mode:o}'
        for field, value in (("uid", node.uid), ("gid", node.gid)):
            if value:
                yield f'sif "{base}" {field} {value}'
        yield f'sif "{base}" mtime @{node.mtime_s}'


def _target(node: Node) -> str:
    return node.data.decode()


def _check_answers(told: str) -> None:
    for line in told.splitlines():
        if not line.startswith(_EXPECTED_ANSWERS):
            raise BuildError(f"debugfs cannot write the root file system: {line}", details=told[-_TOLD_CHARACTERS:])


def _check(path: Path, environ: dict[str, str]) -> None:
    try:
        run(["e2fsck", "-f", "-n", path], timeout_s=_TIMEOUT_S, env=environ, package="e2fsprogs")
    except CommandError as error:
        raise BuildError("e2fsck found faults in the file system that vmkit wrote", details=error.details) from error
