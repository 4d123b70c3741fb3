"""A folder of the host as a root: listed without following a link, and read with care for what changes meanwhile.

A file's content is read when the tree is written. It must then still be the file that was listed: same inode, size and
times. So a folder that changes gives an error and no mixture.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError, ConfigError
from vmkit.image.formats.tree import FileKind, Node, Tree, encode_name
from vmkit.roots.extents import CHUNK_BYTES, Identity, identify
from vmkit.roots.limits import Budget

_DEPTH_LIMIT = 256
_KINDS = {
    stat.S_IFREG: FileKind.FILE,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFCHR: FileKind.CHARACTER,
    stat.S_IFBLK: FileKind.BLOCK,
    stat.S_IFIFO: FileKind.FIFO,
}
_XATTRS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """One file of the folder when it was listed. path: relative to it. link: a symlink's target."""

    path: str
    status: os.stat_result
    link: str = ""

    @property
    def kind(self) -> FileKind:
        return _KINDS[stat.S_IFMT(self.status.st_mode)]


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder at one moment, in the order of its names."""

    folder: Path
    entries: tuple[FolderEntry, ...]

    def digest(self) -> str:
        """Another one as soon as any file may be another: it covers inodes and times, and needs no content."""
        digest = hashlib.sha256()
        for entry in self.entries:
            status = entry.status
            mode, owner = status.st_mode, _map_owner(status)
            digest.update(repr((entry.path, entry.link, mode, owner, status.st_rdev, identify(status))).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class FolderContent:
    """The content of a file that must still be the one that was listed."""

    path: Path
    identity: Identity
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        try:
            descriptor = os.open(self.path, _FLAGS)
        except OSError as error:
            raise _explain(self.path, error) from error
        try:
            self._require_same(descriptor)
            left = self.size_bytes
            while left and (piece := os.read(descriptor, min(left, CHUNK_BYTES))):
                left -= len(piece)
                yield piece
            if left:
                raise _explain_change(self.path)
            self._require_same(descriptor)
        finally:
            os.close(descriptor)

    def _require_same(self, descriptor: int) -> None:
        if identify(os.fstat(descriptor)) != self.identity:
            raise _explain_change(self.path)


def list_folder(folder: Path, budget: Budget) -> Listing:
    """Everything below a folder but sockets, and but what is mounted there.

    Raises ConfigError where this user may not read it, BuildError when it changes or has too much.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _explain(folder, error) from error
    try:
        device = os.fstat(descriptor).st_dev
        entries = list(_list(descriptor, folder, "", device, budget, 0))
    finally:
        os.close(descriptor)
    return Listing(folder, tuple(entries))


def _list(descriptor: int, folder: Path, prefix: str, device: int, budget: Budget, depth: int) -> Iterator[FolderEntry]:
    if depth > _DEPTH_LIMIT:
        raise BuildError(f"{folder / prefix} is more than {_DEPTH_LIMIT} folders deep")
    try:
        with os.scandir(descriptor) as found:
            names = sorted(entry.name for entry in found)
    except OSError as error:
        raise _explain(folder / prefix, error) from error
    for name in names:
        path = f"{prefix}{name}"
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            link = os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else ""
        except OSError as error:
            raise _explain(folder / path, error) from error
        if stat.S_ISSOCK(status.st_mode):
            continue
        budget.take_entry(status.st_size if stat.S_ISREG(status.st_mode) else 0)
        yield FolderEntry(path, status, link)
        # What is mounted there is another file system: /proc of a running chroot, for example.
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            yield from _enter(descriptor, name, folder, path, device, budget, depth)


def _enter(
    parent: int, name: str, folder: Path, path: str, device: int, budget: Budget, depth: int
) -> Iterator[FolderEntry]:
    try:
        descriptor = os.open(name, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
    except OSError as error:
        raise _explain(folder / path, error) from error
    try:
        yield from _list(descriptor, folder, f"{path}/", device, budget, depth + 1)
    finally:
        os.close(descriptor)


def make_tree(listing: Listing) -> Tree:
    """The listing as a tree; contents are read when it is written. Files with several names stay one file."""
    tree = Tree(merged=False)
    linked: dict[tuple[int, int], Node] = {}
    for entry in listing.entries:
        status = entry.status
        key = (status.st_dev, status.st_ino)
        node = linked.get(key) if entry.kind is FileKind.FILE else None
        if node is None:
            node = _make_node(listing.folder, entry)
        if entry.kind is FileKind.FILE and status.st_nlink > 1:
            linked[key] = node
        tree.put(entry.path, node)
    return tree


def _make_node(folder: Path, entry: FolderEntry) -> Node:
    status = entry.status
    uid, gid = _map_owner(status)
    path = folder / entry.path
    is_link = entry.kind is FileKind.SYMLINK
    return Node(
        entry.kind,
        0o777 if is_link else stat.S_IMODE(status.st_mode),
        encode_name(entry.link),
        uid,
        gid,
        (os.major(status.st_rdev), os.minor(status.st_rdev)),
        max(0, int(status.st_mtime)),
        FolderContent(path, identify(status), status.st_size) if entry.kind is FileKind.FILE else None,
        () if is_link else _read_xattrs(path),
    )


def _read_xattrs(path: Path) -> tuple[tuple[str, bytes], ...]:
    """The attributes that a guest needs. A change of one is a change of the file's ctime."""
    found: dict[str, bytes] = {}
    with suppress(OSError):
        for name in os.listxattr(path, follow_symlinks=False):
            if name in _XATTRS or name.startswith("user."):
                found[name] = os.getxattr(path, name, follow_symlinks=False)
    return tuple(sorted(found.items()))


def _map_owner(status: os.stat_result) -> tuple[int, int]:
    """Owner and group in the guest. Without root a user can make no file of root's: what is theirs is root's there."""
    if os.geteuid() == 0:
        return status.st_uid, status.st_gid
    return (
        0 if status.st_uid == os.geteuid() else status.st_uid,
        0 if status.st_gid == os.getegid() else status.st_gid,
    )


def require_same(before: Listing, limits_budget: Budget) -> None:
    """Raises BuildError when the folder is another than when it was listed."""
    after = list_folder(before.folder, limits_budget)
    if after.digest() == before.digest():
        return
    known = {entry.path: identify(entry.status) for entry in before.entries}
    found = {entry.path: identify(entry.status) for entry in after.entries}
    changed = sorted(path for path in known.keys() | found.keys() if known.get(path) != found.get(path))
    raise _explain_change(before.folder / changed[0] if changed else before.folder)


def _explain_change(path: Path) -> BuildError:
    return BuildError(
        f"{path} changed while vmkit packed its folder", hint="stop what writes to the folder, or give a copy of it"
    )


def _explain(path: Path, error: OSError) -> BuildError | ConfigError:
    if isinstance(error, PermissionError):
        return ConfigError(
            f"this user may not read {path}",
            hint="pack the folder as a user who may: sudo tar -C FOLDER --one-file-system -czf root.tar.gz .",
        )
    return _explain_change(path)
