"""A guest's file tree as a value in memory: no root, no ownership on the host's disk, no leftovers.

Invariant: paths are relative, normalised and /usr-merged (as Debian since bookworm), every node's parent is a
directory. Knows nothing of packages or archives.
"""

import fnmatch
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from vmkit.errors import BuildError

# Linux PATH_MAX (linux/limits.h) with its NUL; the kernel's initramfs reader skips longer names.
PATH_LIMIT_BYTES = 4095
# An initramfs lives in the guest's memory twice while it is unpacked: more than this is a disk image's job.
TREE_LIMIT_BYTES = 1 << 30

# The last entry of every archive: a guest too small to unpack its initramfs lacks it, and /init can say so.
COMPLETE_PATH = "etc/vmkit/complete"

# Linux follows 40 (MAXSYMLINKS, linux/namei.h).
_LINK_LIMIT = 40
# A moment that no clock of a guest is before, and that is not "unset" to anyone.
MTIME_S = 1

# Debian's merged /usr: packages of bookworm still ship these, later ones ship usr/ only.
_MERGED = ("bin", "sbin", "lib", "lib64")


class FileKind(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    CHARACTER = "character"


@dataclass(frozen=True, slots=True)
class Node:
    """One inode. data is a file's content or a symlink's target; mode holds permission bits only.

    mtime_s is MTIME_S but for files of an installed Debian, whose compiled Python goes by it.
    """

    kind: FileKind
    mode: int
    data: bytes = b""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    mtime_s: int = MTIME_S


def file_node(data: bytes, mode: int = 0o644) -> Node:
    return Node(FileKind.FILE, mode, data)


def directory_node(mode: int = 0o755) -> Node:
    return Node(FileKind.DIRECTORY, mode)


def symlink_node(target: str) -> Node:
    return Node(FileKind.SYMLINK, 0o777, target.encode())


def normalise_path(path: str) -> str:
    """`path` as the tree knows it: relative, without dots, under usr/ where /usr is merged.

    Raises BuildError when it leaves the tree or is longer than PATH_LIMIT_BYTES.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise BuildError(f"the path '{path}' leaves the guest's file tree")
    if parts and parts[0] in _MERGED and len(parts) > 1:
        parts.insert(0, "usr")
    normal = "/".join(parts)
    if len(normal.encode()) > PATH_LIMIT_BYTES:
        raise BuildError(f"a path of {len(normal)} characters is longer than Linux allows: {normal[:80]}...")
    return normal


class Tree:
    """Path to Node, in sorted order when walked; a later node replaces an earlier one of the same path."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._size_bytes = 0
        for name in _MERGED:
            self._nodes["usr"] = directory_node()
            self._nodes[f"usr/{name}"] = directory_node()
            self._nodes[name] = symlink_node(f"usr/{name}")

    def add(self, path: str, node: Node) -> None:
        """Puts node at path and makes the directories above it. Raises BuildError when an earlier entry forbids it.

        As dpkg does, a path goes through symlinks to directories, and a directory gives way to nothing but a symlink
        that takes the place of an empty one.
        """
        normal = self._follow(normalise_path(path))
        if not normal:
            return
        self._add_parents(normal)
        known = self._nodes.get(normal)
        if known is not None and (known.kind is FileKind.DIRECTORY) != (node.kind is FileKind.DIRECTORY):
            if known.kind is FileKind.SYMLINK:
                return
            if node.kind is not FileKind.SYMLINK or self._has_children(normal):
                raise BuildError(f"the recipe wants '/{normal}' both as a {known.kind} and as a {node.kind}")
        self._size_bytes += len(node.data) - (len(known.data) if known else 0)
        if self._size_bytes > TREE_LIMIT_BYTES:
            raise BuildError(
                f"the guest's file tree is larger than {TREE_LIMIT_BYTES >> 20} MiB at '/{normal}'",
                hint="an initramfs must fit in the guest's memory: list fewer packages",
            )
        self._nodes[normal] = node

    def remove(self, path: str) -> None:
        """Takes a file away, if it is there."""
        node = self._nodes.pop(normalise_path(path), None)
        self._size_bytes -= len(node.data) if node else 0

    def find(self, path: str) -> Node | None:
        return self._nodes.get(normalise_path(path))

    def resolve(self, path: str) -> Node | None:
        """The node at path after following symlinks, in its last part too (a library's soname, for example)."""
        normal = self._follow(normalise_path(path))
        for _ in range(_LINK_LIMIT):
            node = self._nodes.get(normal)
            if node is None or node.kind is not FileKind.SYMLINK:
                return node
            normal = self._follow(_join_link(normal, node))
        return None

    def glob(self, pattern: str) -> list[str]:
        """The sorted paths that match a shell pattern; `*` crosses slashes."""
        return sorted(fnmatch.filter(self._nodes, normalise_path(pattern)))

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Every path and node, parents before children, COMPLETE_PATH last: the order depends on the names alone."""
        for path in sorted(self._nodes, key=lambda path: (path == COMPLETE_PATH, path)):
            yield path, self._nodes[path]

    def _follow(self, normal: str) -> str:
        """The path with the symlinks above its last part replaced by what they point to."""
        for _ in range(_LINK_LIMIT):
            parts = normal.split("/")
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                node = self._nodes.get(parent)
                if node is not None and node.kind is FileKind.SYMLINK:
                    normal = "/".join([_join_link(parent, node), *parts[depth:]])
                    break
            else:
                return normal
        raise BuildError(f"'/{normal}' leads through too many symlinks")

    def _add_parents(self, normal: str) -> None:
        parts = normal.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = "/".join(parts[:depth])
            node = self._nodes.setdefault(parent, directory_node())
            if node.kind is not FileKind.DIRECTORY:
                raise BuildError(f"cannot put '/{normal}' there: '/{parent}' is a {node.kind}, not a directory")

    def _has_children(self, normal: str) -> bool:
        return any(path.startswith(normal + "/") for path in self._nodes)


def _join_link(path: str, link: Node) -> str:
    """Where a symlink at path points to; `..` stops at the root, as in the guest."""
    target = posixpath.join("/", posixpath.dirname(path), link.data.decode(errors="replace"))
    return normalise_path(posixpath.normpath(target))
