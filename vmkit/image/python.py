"""CPython for a guest: the interpreter and only the library modules a recipe lists, compiled by that very interpreter.

Library modules are shipped as .pyc alone (smaller to unpack, one stat less per import), vshd with its sources, so that
its tracebacks show lines. Every .pyc is hash-based and unchecked (PEP 552): the guest trusts it without looking at the
source's time. The guest's interpreter runs here through the guest's own loader and libraries. Knows Debian's layout of
Python packages, nothing of recipes.
"""

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vmkit.errors import BuildError, CommandError
from vmkit.image.debian.deb import read_deb
from vmkit.image.formats.tree import Kind, Node, Tree, file_node, symlink_node
from vmkit.image.needs import Needs
from vmkit.run import run

# Compiling a hundred modules takes about a second.
_COMPILE_TIMEOUT_S = 120.0
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2"

_DEBIAN_PACKAGES = "usr/lib/python3/dist-packages"

# argv: the list file, with one job, "source output name level", per four lines. The name becomes co_filename: the
# guest's path.
_COMPILER = """
import importlib.util as util, marshal, sys
with open(sys.argv[1], encoding="utf-8") as jobs:
    lines = jobs.read().splitlines()
for source, output, name, level in zip(lines[0::4], lines[1::4], lines[2::4], lines[3::4]):
    with open(source, "rb") as file:
        text = file.read()
    # Level 2, without docstrings: the guest reads and unmarshals each of these at every boot.
    code = compile(text, name, "exec", dont_inherit=True, optimize=int(level))
    # PEP 552: flag bit 0 is "hash-based"; bit 1, "check the source", stays clear.
    with open(output, "wb") as file:
        file.write(util.MAGIC_NUMBER + (1).to_bytes(4, "little") + util.source_hash(text) + marshal.dumps(code))
"""
# argv: the names of modules, `NAME?` for one that may be missing, and `codec:NAME`.
_IMPORTER = """
import codecs, importlib, sys
failures = []
for name in sys.argv[1:]:
    if name.startswith("codec:"):
        try:
            codecs.lookup(name[6:])
        except LookupError as error:
            failures.append(f"{name}: {error}")
        continue
    name, optional, _ = name.partition("?")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (optional and error.name == name):
            failures.append(f"{name}: {error}")
    except ImportError as error:
        failures.append(f"{name}: {error}")
sys.exit("\\n".join(failures) or None)
"""


class GuestPython:
    """The interpreter of a tree that is being built, version like `3.13`."""

    def __init__(self, tree: Tree, version: str, work: Path) -> None:
        self.version = version
        self.library = f"usr/lib/python{version}"
        self.program = f"usr/bin/python{version}"
        self._tree = tree
        self._work = work
        self._sources: dict[str, bytes] = {}

    def take_program(self, deb: Path) -> None:
        """Adds the interpreter, as /usr/bin/python3 too."""
        for path, node in read_deb(deb):
            if path == self.program:
                self._tree.add(path, node)
        if self._tree.find(self.program) is None:
            raise BuildError(f"the package {deb.stem} holds no {self.program}")
        self._tree.add("usr/bin/python3", symlink_node(f"python{self.version}"))

    def take_library(self, debs: Iterable[Path], modules: Sequence[str]) -> None:
        """Adds the listed modules.

        `json` is a module or a whole package, `encodings.utf_8` one module of a package, `_colorize?` optional.
        """
        prefix = self.library + "/"
        names = [module.removesuffix("?") for module in modules]
        for deb in debs:
            for path, node in read_deb(deb):
                if node.kind is not Kind.FILE or not path.startswith(prefix):
                    continue
                name = _module_name(path.removeprefix(prefix))
                if name and _is_listed(name, names):
                    self._add_module(path, node)

    def take_package(self, name: str, sources: Mapping[str, bytes], *, of_debian: bool = False) -> None:
        """Adds a package of our own beside the library, where `-I -S` finds it; sources are kept beside their .pyc.

        of_debian: where Debian's own packages are, for programs of the guest's; with docstrings, which may be a
        program's help.
        """
        for path, text in sources.items():
            guest_path = f"{_DEBIAN_PACKAGES if of_debian else self.library}/{name}/{path}"
            self._tree.add(guest_path, file_node(text))
            if path.endswith(".py"):
                self._sources[guest_path] = text

    def compile(self) -> None:
        """Compiles everything taken, in sorted order, and puts the .pyc files into the tree."""
        self._write_root()
        jobs, outputs = [], {}
        for index, guest_path in enumerate(sorted(self._sources)):
            output = self._work / f"{index}.pyc"
            outputs[guest_path] = output
            level = "0" if guest_path.startswith(_DEBIAN_PACKAGES) else "2"
            jobs += [str(self._work / "root" / guest_path), str(output), f"/{guest_path}", level]
        (self._work / "jobs").write_text("\n".join(jobs) + "\n")
        self._run(_COMPILER, str(self._work / "jobs"))
        for guest_path, output in outputs.items():
            self._tree.add(self._pyc_path(guest_path), file_node(output.read_bytes()))

    def forget_compiled(self, path: str) -> None:
        """Takes away the .pyc of a file that a recipe replaces: it would be trusted instead of the file."""
        if path.endswith(".py"):
            self._tree.remove(path + "c")
            self._tree.remove(self._cached_path(path))

    def check_imports(self, modules: Sequence[str], needs: Needs) -> None:
        """Imports each listed module, and what vshd needs, with nothing but what was taken.

        Raises BuildError naming what is missing.
        """
        codecs = [f"codec:{name}" for name in needs.codecs]
        try:
            self._run(_IMPORTER, *modules, *needs.modules, *codecs)
        except CommandError as error:
            raise BuildError(
                f"the guest's Python lacks a module or codec: {error.details.splitlines()[-1]}",
                details=error.details,
                hint="add the missing module to the recipe's `python_modules` (a codec is encodings.NAME), or its "
                "library to [extract]",
            ) from error

    def _add_module(self, path: str, node: Node) -> None:
        if not path.endswith(".py"):
            self._tree.add(path, Node(Kind.FILE, 0o644, node.data))
            return
        self._sources[path] = node.data

    def _pyc_path(self, path: str) -> str:
        if self._tree.find(path) is None:
            return path + "c"
        return self._cached_path(path)

    def _cached_path(self, path: str) -> str:
        folder, base = posixpath.split(path)
        tag = self.version.replace(".", "")
        return f"{folder}/__pycache__/{base.removesuffix('.py')}.cpython-{tag}.pyc"

    def _write_root(self) -> None:
        """What the interpreter needs to run here: itself, the libraries, the modules as sources."""
        for path, node in self._tree.walk():
            if node.kind is Kind.FILE and path.startswith((_LIBRARIES + "/", self.library + "/", self.program)):
                self._write(path, node.data)
            elif node.kind is Kind.SYMLINK and path.startswith(_LIBRARIES + "/"):
                library = self._tree.resolve(path)
                if library is not None and library.kind is Kind.FILE:
                    self._write(path, library.data)
        for path, text in self._sources.items():
            self._write(path, text)

    def _write(self, path: str, data: bytes) -> None:
        target = self._work / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(0o755 if path in (self.program, _LOADER) else 0o644)

    def _run(self, script: str, *words: str) -> bytes:
        root = self._work / "root"
        loader = root / _LOADER
        if not loader.is_file():
            raise BuildError(
                "the image holds no C library to run Python with", hint="list libc6 in the recipe's [extract]"
            )
        argv: list[str | Path] = [loader, "--inhibit-cache", "--library-path", root / _LIBRARIES, root / self.program]
        # A fixed hash seed: the order of a set constant in a .pyc must not change from build to build.
        environ = {"PYTHONHASHSEED": "0", "PYTHONHOME": str(root / "usr"), "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        # No column tables either: a traceback in the guest still has its lines.
        return run(
            [*argv, "-s", "-S", "-B", "-X", "no_debug_ranges", "-c", script, *words],
            timeout_s=_COMPILE_TIMEOUT_S,
            env=environ,
        )


def _module_name(relative: str) -> str:
    """The dotted name of a file below the library folder, or empty for what is no module."""
    if relative.startswith("lib-dynload/"):
        return posixpath.basename(relative).partition(".")[0]
    if not relative.endswith(".py"):
        return ""
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _is_listed(name: str, modules: Sequence[str]) -> bool:
    """True for a listed module, what is inside a listed package, and the packages a listed module is inside."""
    return any(name == listed or name.startswith(listed + ".") or listed.startswith(name + ".") for listed in modules)
