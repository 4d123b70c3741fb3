"""The files that a guest remembers, by the numbers that it has for them: where each was seen, and which file it was.

A node is a name in a folder, and no descriptor: so a guest that has seen a million files costs this host memory alone.
Knows no file system.
"""

import errno
import os

# The number of the folder itself, as FUSE has it.
ROOT = 1
# About 300 bytes each.
NODES_MAX = 1 << 19
# Deeper paths are not made by people, and a walk must end.
DEPTH_MAX = 1024

# The device and the inode number of a file.
Key = tuple[int, int]


class KnownFile:
    """One file. parent: the number of the folder where it was seen last, of which the guest may know no more.
    lookups: how often the guest was told of it, less how often it forgot. files: its open descriptors. seen: size and
    times when the guest opened it last.
    """

    __slots__ = ("files", "key", "lookups", "name", "number", "parent", "seen")

    def __init__(self, number: int, key: Key, parent: int, name: bytes) -> None:
        self.number = number
        self.key = key
        self.parent = parent
        self.name = name
        self.lookups = 0
        self.files: list[int] = []
        self.seen: tuple[int, int, int] | None = None


class KnownFiles:
    """Invariant: a node is in `_by_number` as long as the guest may name it, and none holds another: NODES_MAX is a
    ceiling, whatever a guest forgets. Each is the only one of its key, unless its file was removed: then the key may be
    another file's.
    """

    def __init__(self, key: Key) -> None:
        """key: of the folder itself."""
        self.root = KnownFile(ROOT, key, 0, b"")
        self._by_number = {ROOT: self.root}
        self._by_key = {key: self.root}
        self._last = ROOT

    def __len__(self) -> int:
        return len(self._by_number)

    def find(self, number: int) -> KnownFile:
        """Raises OSError for a node that the guest was not told of, or has forgotten."""
        node = self._by_number.get(number)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def remember(self, parent: KnownFile, name: bytes, key: Key) -> KnownFile:
        """The guest is told of this name. Raises OSError when it remembers too many."""
        node = self._by_key.get(key)
        if node is None:
            if len(self._by_number) >= NODES_MAX:
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            self._last += 1
            node = KnownFile(self._last, key, parent.number, name)
            self._by_number[node.number] = self._by_key[key] = node
            self._hold(parent.number)
        elif node is not self.root:
            self._place(node, parent, name)
        node.lookups += 1
        return node

    def keep(self, node: KnownFile) -> None:
        """The guest is told once more of a file that it knows."""
        node.lookups += 1

    def forget(self, number: int, count: int) -> None:
        """A guest may forget what it never knew: nothing comes of it."""
        node = self._by_number.get(number)
        if node is None or node is self.root:
            return
        node.lookups -= count
        if node.lookups <= 0:
            del self._by_number[number]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            self._let_go(node.parent)

    def move(self, key: Key, parent: KnownFile, name: bytes) -> None:
        """A file has another name now."""
        node = self._by_key.get(key)
        if node is not None and node is not self.root:
            self._place(node, parent, name)

    def remove(self, key: Key) -> None:
        """The last name of a file is gone. Its inode number may become another file's."""
        node = self._by_key.get(key)
        if node is not None and node is not self.root:
            del self._by_key[key]

    def _place(self, node: KnownFile, parent: KnownFile, name: bytes) -> None:
        before = node.parent
        node.parent, node.name = parent.number, name
        if before != parent.number:
            self._hold(parent.number)
            self._let_go(before)

    def _hold(self, number: int) -> None:
        """A node has this one as its parent."""

    def _let_go(self, number: int) -> None:
        """A node does not have this one as its parent any more."""

    def find_path(self, node: KnownFile) -> list[bytes]:
        """The names from the folder down to a node; none for the folder itself.

        Raises OSError: ESTALE, where the guest has forgotten a folder above. Its kernel then walks the path anew.
        """
        names = []
        while node is not self.root:
            names.append(node.name)
            if len(names) > DEPTH_MAX:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            node = self.find(node.parent)
        names.reverse()
        return names


class RootedFiles(KnownFiles):
    """For a protocol whose guests name a file without the folders above: each node counts once more for each below it.

    So the way to a file that the guest names is known. NODES_MAX counts the folders of the way as well.
    """

    def _hold(self, number: int) -> None:
        node = self._by_number.get(number)
        if node is not None:
            node.lookups += 1

    def _let_go(self, number: int) -> None:
        # Not by forget(), which would call this function once for each folder above.
        while (node := self._by_number.get(number)) is not None and node is not self.root:
            node.lookups -= 1
            if node.lookups > 0:
                return
            del self._by_number[number]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            number = node.parent
