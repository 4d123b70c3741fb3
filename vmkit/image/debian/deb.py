"""A Debian package's files into a Tree, without root and without running anything of the package's own.

Maintainer scripts are not run and nothing is configured: the image's templates do what an image needs. Knows nothing of
apt.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmkit.errors import BuildError
from vmkit.image.formats.tar import read_tar
from vmkit.image.formats.tree import FileKind, Node, Tree, normalise_path
from vmkit.run import open_output

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
    """Every member of a package, as normalised path and node; a hard link becomes a copy.

    Raises CommandError where dpkg-deb cannot read the package, BuildError where its content is damaged.
    """
    trouble = None
    with open_output(["dpkg-deb", "--fsys-tarfile", deb], timeout_s=UNPACK_TIMEOUT_S, package="dpkg") as output:
        try:
            yield from read_tar(output)
        except BuildError as error:
            trouble = BuildError(f"cannot read the package {deb.name}: {error.brief}", hint=error.hint)
            if output.read(1):
                raise trouble from error
            # dpkg-deb itself may have failed: then that is the cause, and leaving the block raises it.
    if trouble is not None:
        raise trouble


def extract_deb(deb: Path, tree: Tree, wanted: Chooser = everything_but_documentation) -> None:
    """Adds the wanted files of a package to the tree."""
    for path, node in read_deb(deb):
        if (node.kind is not FileKind.DIRECTORY and wanted(path)) or (
            node.kind is FileKind.DIRECTORY and wanted(path + "/")
        ):
            tree.add(path, node)


def extract_patterns(deb: Path, tree: Tree, patterns: Sequence[str]) -> None:
    """Adds exactly the files that match the patterns. Raises BuildError naming a pattern that matched nothing."""
    normal = {pattern: normalise_path(pattern) for pattern in patterns}
    unmatched = set(patterns)
    for path, node in read_deb(deb):
        if node.kind is FileKind.DIRECTORY:
            continue
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(path, normal[pattern])]
        if hits:
            unmatched.difference_update(hits)
            tree.add(path, node)
    if unmatched:
        listed = ", ".join(f"'{pattern}'" for pattern in sorted(unmatched))
        raise BuildError(f"the package {deb.stem} has no file that matches {listed}", hint="see the recipe's [extract]")
