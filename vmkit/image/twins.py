"""Programs of the host's architecture, for a build that may not run those of its guest: Python and busybox.

A guest of another architecture has programs that this host's processor cannot run. Their twins are the same packages
of the host's architecture. Python's bytecode is the same everywhere, and so is the list of busybox's applets. Nothing
of a twin gets into the guest.
"""

from collections.abc import Mapping
from pathlib import Path

from vmkit.architectures import ARCHITECTURES, HOST
from vmkit.errors import BuildError
from vmkit.image.debian.deb import extract_patterns
from vmkit.image.debian.packages import python_packages
from vmkit.image.formats.tree import FileKind, Tree
from vmkit.image.interpreter import Interpreter, make_interpreter

_BUSYBOX = "usr/bin/busybox"
_LIBRARIES = ("libexpat1", "libffi8", "zlib1g")


class Twins:
    """The packages, which are unpacked when they are needed. debs: by name, as vmkit.image.debian.packages.fetch."""

    def __init__(self, debs: Mapping[str, Path], work: Path) -> None:
        """work: a folder that this may make."""
        self._debs = debs
        self._work = work
        self._row = ARCHITECTURES[HOST]

    def read_busybox(self) -> bytes:
        """The program."""
        tree = Tree()
        extract_patterns(self._find("busybox-static"), tree, [_BUSYBOX])
        node = tree.find(_BUSYBOX)
        assert node is not None
        return node.data

    def make_interpreter(self, version: str) -> Interpreter:
        """Python of a version like `3.13`, with the whole of its library."""
        tree = Tree()
        libraries = f"usr/lib/{self._row.triplet}/*"
        for name in ("libc6", *_LIBRARIES):
            extract_patterns(self._find(name), tree, [libraries])
        for name in python_packages(version):
            extract_patterns(self._find(name), tree, [f"usr/*/python{version}*"])
        for path, node in tree.walk():
            found = tree.resolve(path) if node.kind is FileKind.SYMLINK else node
            if found is not None and found.kind is FileKind.FILE:
                target = self._work / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(found.data)
                target.chmod(0o755)
        return make_interpreter(self._work, f"usr/bin/python{version}", self._row, is_guests=False)

    def _find(self, name: str) -> Path:
        try:
            return self._debs[f"{name}:{HOST}"]
        except KeyError as error:
            raise BuildError(
                f"the package lock does not hold {name} for {HOST}", hint="vmkit build --update"
            ) from error
