"""A guest's file tree as a value in memory: no root, no ownership on the host's disk, no leftovers.

Invariant: paths are relative, normalised and, unless the tree is made without, /usr-merged (as Debian since bookworm).
Every node's parent is a directory. A name that is not UTF-8 keeps its bytes as surrogates (PEP 383). Knows nothing of
packages or archives.
"""

import fnmatch
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

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
    BLOCK = "block device"
    FIFO = "named pipe"


class Content(Protocol):
    """A file's content that is not in memory: it is read when the tree is written."""

    @property
    def size_bytes(self) -> int: ...

    def chunks(self) -> Iterator[bytes]:
        """The content in pieces, size_bytes in all. Raises BuildError where it cannot be read any more."""
        ...


@dataclass(frozen=True, slots=True)
class Node:
    """One inode. data is a file's content or a symlink's target; mode holds permission bits only.

    A node at several paths of a tree is one file with hard links. content replaces data where a file's content is
    elsewhere. mtime_s is MTIME_S but for files of an installed Debian, whose compiled Python goes by it, and of roots
    that users bring.
    """

    kind: FileKind
    mode: int
    data: bytes = b""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    mtime_s: int = MTIME_S
    content: Content | None = None
    xattrs: tuple[tuple[str, bytes], ...] = ()

    @property
    def size_bytes(self) -> int:
        return len(self.data) if self.content is None else self.content.size_bytes

    def chunks(self) -> Iterator[bytes]:
        """The content of a file, in pieces."""
        if self.content is not None:
            yield from self.content.chunks()
        elif self.data:
            yield self.data


def file_node(data: bytes, mode: int = 0o644) -> Node:
    return Node(FileKind.FILE, mode, data)


def directory_node(mode: int = 0o755) -> Node:
    return Node(FileKind.DIRECTORY, mode)


def symlink_node(target: str) -> Node:
    return Node(FileKind.SYMLINK, 0o777, target.encode())


def encode_name(name: str) -> bytes:
    """The bytes of a path or a symlink's target."""
    return name.encode(errors="surrogateescape")


def decode_name(name: bytes) -> str:
    """The text of a path or a symlink's target. encode_name gives the same bytes back."""
    return name.decode(errors="surrogateescape")


def normalise_path(path: str, *, merged: bool = True) -> str:
    """`path` as the tree knows it: relative, without dots, under usr/ where /usr is merged.

    Raises BuildError when it leaves the tree or is longer than PATH_LIMIT_BYTES.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise BuildError(f"the path '{path}' leaves the guest's file tree")
    if merged and len(parts) > 1 and parts[0] in _MERGED:
        parts.insert(0, "usr")
    normal = "/".join(parts)
    if len(encode_name(normal)) > PATH_LIMIT_BYTES:
        raise BuildError(f"a path of {len(normal)} characters is longer than Linux allows: {normal[:80]}...")
    return normal


class Tree:
    """Path to Node, in sorted order when walked; a later node replaces an earlier one of the same path.

    merged: whether the tree has, and keeps to, Debian's merged /usr. A root that a user brings is as it is.
    """

    def __init__(self, *, merged: bool = True) -> None:
        self._merged = merged
        self._nodes: dict[str, Node] = {}
        # The names in each directory that has some.
        self._children: dict[str, set[str]] = {}
        self._size_bytes = 0
        for name in _MERGED if merged else ():
            self._set("usr", directory_node())
            self._set(f"usr/{name}", directory_node())
            self._set(name, symlink_node(f"usr/{name}"))

    def add(self, path: str, node: Node) -> None:
        """Puts node at path and makes the directories above it. Raises BuildError when an earlier entry forbids it.

        As dpkg does, a path goes through symlinks to directories, and a directory gives way to nothing but a symlink
        that takes the place of an empty one.
        """
        normal = self._follow(self._normalise(path))
        if not normal:
            return
        self._add_parents(normal)
        known = self._nodes.get(normal)
        if known is not None and (known.kind is FileKind.DIRECTORY) != (node.kind is FileKind.DIRECTORY):
            if known.kind is FileKind.SYMLINK:
                return
            if node.kind is not FileKind.SYMLINK or normal in self._children:
                raise BuildError(f"the recipe wants '/{normal}' both as a {known.kind} and as a {node.kind}")
        self._size_bytes += len(node.data) - (len(known.data) if known else 0)
        if self._size_bytes > TREE_LIMIT_BYTES:
            raise BuildError(
                f"the guest's file tree is larger than {TREE_LIMIT_BYTES >> 20} MiB at '/{normal}'",
                hint="an initramfs must fit in the guest's memory: list fewer packages",
            )
        self._set(normal, node)

    def put(self, path: str, node: Node) -> None:
        """Puts node at path as a container's layer does: what was there goes, but a directory keeps its content.

        A path goes through symlinks to directories, which lead nowhere but into the tree. Raises BuildError where a
        parent is no directory.
        """
        normal = self._follow(self._normalise(path))
        if not normal:
            return
        self._add_parents(normal)
        known = self._nodes.get(normal)
        if known is not None and (known.kind, node.kind) != (FileKind.DIRECTORY, FileKind.DIRECTORY):
            self._remove_all(normal)
        self._set(normal, node)

    def remove(self, path: str) -> None:
        """Takes a file away, if it is there."""
        self._remove_all(self._normalise(path))

    def discard(self, path: str) -> None:
        """Takes away what is at path after following the symlinks above it, a directory with all that is in it."""
        normal = self._follow(self._normalise(path))
        if normal:
            self._remove_all(normal)

    def empty(self, path: str) -> None:
        """Takes away what is in a directory, and leaves the directory."""
        normal = self._follow(self._normalise(path))
        for name in list(self._children.get(normal, ())):
            self._remove_all(f"{normal}/{name}" if normal else name)

    def find(self, path: str) -> Node | None:
        return self._nodes.get(self._normalise(path))

    def look_up(self, path: str) -> Node | None:
        """The node at path after following the symlinks above it. A symlink at path itself is the node."""
        return self._nodes.get(self._follow(self._normalise(path)))

    def resolve(self, path: str) -> Node | None:
        """The node at path after following symlinks, in its last part too (a library's soname, for example)."""
        normal = self._follow(self._normalise(path))
        for _ in range(_LINK_LIMIT):
            node = self._nodes.get(normal)
            if node is None or node.kind is not FileKind.SYMLINK:
                return node
            normal = self._follow(self._join_link(normal, node))
        return None

    def glob(self, pattern: str) -> list[str]:
        """The sorted paths that match a shell pattern; `*` crosses slashes."""
        return sorted(fnmatch.filter(self._nodes, self._normalise(pattern)))

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Every path and node, parents before children, COMPLETE_PATH last: the order depends on the names alone."""
        for path in sorted(self._nodes, key=lambda path: (path == COMPLETE_PATH, path)):
            yield path, self._nodes[path]

    def __len__(self) -> int:
        return len(self._nodes)

    def _normalise(self, path: str) -> str:
        return normalise_path(path, merged=self._merged)

    def _follow(self, normal: str) -> str:
        """The path with the symlinks above its last part replaced by what they point to."""
        for _ in range(_LINK_LIMIT):
            end = normal.find("/")
            while end >= 0:
                node = self._nodes.get(normal[:end])
                if node is not None and node.kind is FileKind.SYMLINK:
                    normal = f"{self._join_link(normal[:end], node)}{normal[end:]}".lstrip("/")
                    break
                end = normal.find("/", end + 1)
            else:
                return normal
        raise BuildError(f"'/{normal}' leads through too many symlinks")

    def _join_link(self, path: str, link: Node) -> str:
        """Where a symlink at path points to; `..` stops at the root, as in the guest."""
        target = posixpath.join("/", posixpath.dirname(path), decode_name(link.data))
        return self._normalise(posixpath.normpath(target))

    def _add_parents(self, normal: str) -> None:
        end = normal.find("/")
        while end >= 0:
            parent = normal[:end]
            node = self._nodes.get(parent)
            if node is None:
                self._set(parent, directory_node())
            elif node.kind is not FileKind.DIRECTORY:
                raise BuildError(f"cannot put '/{normal}' there: '/{parent}' is a {node.kind}, not a directory")
            end = normal.find("/", end + 1)

    def _set(self, normal: str, node: Node) -> None:
        if normal not in self._nodes:
            folder, _, name = normal.rpartition("/")
            self._children.setdefault(folder, set()).add(name)
        self._nodes[normal] = node

    def _remove_all(self, normal: str) -> None:
        """Takes away a path, if it is there, and all below it."""
        if normal not in self._nodes:
            return
        folder, _, name = normal.rpartition("/")
        siblings = self._children[folder]
        siblings.discard(name)
        if not siblings:
            del self._children[folder]
        waiting = [normal]
        while waiting:
            path = waiting.pop()
            self._size_bytes -= len(self._nodes.pop(path).data)
            waiting += [f"{path}/{name}" for name in self._children.pop(path, ())]
