"""The CPython that compiles a guest's modules: this host's where it is the guest's very release, else the guest's own.

The guest's own is a program of the image's packages, run on this host through the guest's loader and libraries. A guest
of another architecture has a twin for that (vmkit.image.twins). The host's is better: nothing of the image runs then.
Its bytecode would be valid if only the minor version was the same, but not equal: of 597 modules of CPython 3.13,
releases 0 and 5 compile 207 to other code. A build must not depend on the host that makes it, so the release must be
the same, too.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.architectures import Architecture
from vmkit.errors import BuildError, CommandError, HostError
from vmkit.run import run

# Compiling a hundred modules takes about a second.
_TIMEOUT_S = 120.0
_QUERY_TIMEOUT_S = 20.0
# A distribution's own Python is here, also when another Python runs vmkit.
_SYSTEM = "/usr/bin/python{}.{}"
# vmkit.image.imports is written for it.
_OLDEST_MINOR = 11
# `3.13.5-2+deb13u5`: release 3.13.5. A release candidate, `3.14.0~rc2-1`, is none.
_DEBIAN_VERSION = re.compile(r"(?:[0-9]+:)?([0-9]+\.[0-9]+\.[0-9]+)(?:[-+]|$)")
# importlib/_bootstrap_external.py names it so, up to 3.13; 3.14's is in the interpreter alone.
_MAGIC = re.compile(rb"^MAGIC_NUMBER = \(([0-9]+)\)\.to_bytes\(2, 'little'\) \+ b'\\r\\n'$", re.MULTILINE)
_DESCRIBE = """
import importlib.util, sys
print(sys.implementation.name, *sys.version_info[:4], importlib.util.MAGIC_NUMBER.hex())
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """How to run it. home: the folder of its library, where it would not find that by itself.

    is_guests: it has the guest's library, so that it finds what the guest will find.
    """

    argv: tuple[Path, ...]
    home: Path | None
    is_guests: bool

    def run(self, script: str, *words: str, cwd: Path) -> bytes:
        """Runs a script, without site-packages. Raises CommandError. cwd is where imports are looked for first."""
        return self._run(["-c", script, *words], b"", cwd)

    def run_file(self, script: Path, stdin: bytes, *, cwd: Path) -> bytes:
        """Runs a script that is a file of ours, and gives it something to read. Raises CommandError."""
        return self._run([str(script)], stdin, cwd)

    def _run(self, words: list[str], stdin: bytes, cwd: Path) -> bytes:
        # A fixed hash seed: the order of a set constant in a .pyc must not change from build to build.
        environ = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        if self.home is not None:
            environ["PYTHONHOME"] = str(self.home)
        # No column tables either: a traceback in the guest still has its lines.
        argv: list[str | Path] = [*self.argv, "-s", "-S", "-B", "-X", "no_debug_ranges", *words]
        return run(argv, timeout_s=_TIMEOUT_S, env=environ, cwd=cwd, stdin=stdin)


def find_release(debian_version: str) -> str:
    """CPython's release in the version of a Debian package; empty for one before its release."""
    found = _DEBIAN_VERSION.match(debian_version)
    return found[1] if found else ""


def find_magic(bootstrap_external: bytes) -> bytes:
    """The magic number of the bytecode in importlib/_bootstrap_external.py; empty where it is not there."""
    found = _MAGIC.search(bootstrap_external)
    return int(found[1]).to_bytes(2, "little") + b"\r\n" if found else b""


def find_host_interpreter(release: str, magic: bytes) -> Interpreter | None:
    """An interpreter of this host of exactly that release and bytecode."""
    wanted = f"cpython {release.replace('.', ' ')} final {magic.hex()}"
    for path, description in _list_interpreters(release):
        if description == wanted:
            return Interpreter((path,), None, is_guests=False)
    return None


def make_interpreter(root: Path, program: str, architecture: Architecture, *, is_guests: bool) -> Interpreter:
    """A Debian's own, with its libraries, in a folder of the host's. Raises BuildError where it has no C library."""
    libraries = root / "usr/lib" / architecture.triplet
    loader = libraries / Path(architecture.loader).name
    if not loader.is_file():
        raise BuildError("the image holds no C library to run Python with", hint="list libc6 in the recipe's [extract]")
    words = ("--inhibit-cache", "--library-path")
    return Interpreter((loader, *map(Path, words), libraries, root / program), root / "usr", is_guests)


def _list_interpreters(release: str) -> Iterator[tuple[Path, str]]:
    version = " ".join(map(str, sys.version_info[:4]))
    yield Path(sys.executable), f"{sys.implementation.name} {version} {importlib.util.MAGIC_NUMBER.hex()}"
    major, minor, _ = release.split(".")
    path = Path(_SYSTEM.format(major, minor))
    if int(minor) >= _OLDEST_MINOR and path.exists():
        try:
            yield path, run([path, "-I", "-S", "-c", _DESCRIBE], timeout_s=_QUERY_TIMEOUT_S).decode().strip()
        except (CommandError, HostError):
            return
