"""A Debian package's files into a Tree, without root and without running anything of the package's own.

Maintainer scripts are not run and nothing is configured: the image's templates do what an image needs. Knows nothing of
apt.
"""

import fnmatch
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmkit.errors import BuildError
from vmkit.image.formats.tree import MTIME_S, Kind, Node, Tree, normalise_path
from vmkit.run import run

# Unpacking the largest kernel package takes about one second; a hundred times that is a hung disk.
UNPACK_TIMEOUT_S = 120.0

# What a guest that is thrown away does not read.
DOCUMENTATION = (
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/info/*",
    "usr/share/locale/*",
    "usr/share/lintian/*",
    "usr/share/bug/*",
)

Chooser = Callable[[str], bool]


def everything_but_documentation(path: str) -> bool:
    """True for a path that a guest may want."""
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in DOCUMENTATION)


def read_deb(deb: Path) -> Iterator[tuple[str, Node]]:
    """Every member of a package, as normalised path and node; a hard link becomes a copy."""
    tar_bytes = run(["dpkg-deb", "--fsys-tarfile", deb], timeout_s=UNPACK_TIMEOUT_S, package="dpkg")
    try:
        with tarfile.open(fileobj=io.BytesIO(tar_bytes), mode="r:") as tar:
            for member in tar:
                node = node_of_member(tar, member)
                if node is not None:
                    yield normalise_path(member.name), node
    except tarfile.TarError as error:
        raise BuildError(f"cannot read the package {deb.name}: {error}") from error


def extract_deb(deb: Path, tree: Tree, wanted: Chooser = everything_but_documentation) -> None:
    """Adds the wanted files of a package to the tree."""
    for path, node in read_deb(deb):
        if (node.kind is not Kind.DIRECTORY and wanted(path)) or (node.kind is Kind.DIRECTORY and wanted(path + "/")):
            tree.add(path, node)


def extract_patterns(deb: Path, tree: Tree, patterns: Sequence[str]) -> None:
    """Adds exactly the files that match the patterns. Raises BuildError naming a pattern that matched nothing."""
    normal = {pattern: normalise_path(pattern) for pattern in patterns}
    unmatched = set(patterns)
    for path, node in read_deb(deb):
        if node.kind is Kind.DIRECTORY:
            continue
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(path, normal[pattern])]
        if hits:
            unmatched.difference_update(hits)
            tree.add(path, node)
    if unmatched:
        listed = ", ".join(f"'{pattern}'" for pattern in sorted(unmatched))
        raise BuildError(f"the package {deb.stem} has no file that matches {listed}", hint="see the recipe's [extract]")


def node_of_member(tar: tarfile.TarFile, member: tarfile.TarInfo, *, keep_time: bool = False) -> Node | None:
    """A tar's member as a node; a hard link becomes a copy, what is neither file, directory nor symlink None."""
    mode = member.mode & 0o7777
    mtime_s = int(member.mtime) if keep_time else MTIME_S
    if member.isdir():
        return Node(Kind.DIRECTORY, mode, uid=member.uid, gid=member.gid, mtime_s=mtime_s)
    if member.issym():
        return Node(Kind.SYMLINK, 0o777, member.linkname.encode(), member.uid, member.gid, mtime_s=mtime_s)
    if member.isreg() or member.islnk():
        source = tar.extractfile(member)
        data = source.read() if source else b""
        return Node(Kind.FILE, mode, data, uid=member.uid, gid=member.gid, mtime_s=mtime_s)
    # Debian's policy forbids device nodes in packages; a fifo or socket has no use in an image.
    return None
