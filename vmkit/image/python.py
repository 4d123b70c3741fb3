"""CPython for a guest: the interpreter and only the library modules a recipe lists, compiled.

Library modules are shipped as .pyc alone (smaller to unpack, one stat less per import), vshd with its sources, so that
its tracebacks show lines. Every .pyc is hash-based and unchecked (PEP 552): the guest trusts it without looking at the
source's time. vmkit.image.interpreter chooses the interpreter that compiles. Knows Debian's layout of Python packages,
nothing of recipes.
"""

import encodings
import json
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from encodings.aliases import aliases
from pathlib import Path

from vmkit.architectures import ARCHITECTURES, HOST, Architecture
from vmkit.errors import BuildError, CommandError
from vmkit.image import imports
from vmkit.image.debian.deb import read_deb
from vmkit.image.formats.tree import FileKind, Node, Tree, file_node, symlink_node
from vmkit.image.interpreter import (
    Interpreter,
    find_host_interpreter,
    find_magic,
    make_interpreter,
)
from vmkit.image.needs import Needs

DEBIAN_PACKAGES = "usr/lib/python3/dist-packages"

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

    def __init__(
        self,
        tree: Tree,
        version: str,
        release: str,
        work: Path,
        architecture: Architecture = ARCHITECTURES[HOST],
        make_twin: Callable[[str], Interpreter] | None = None,
    ) -> None:
        """release: like `3.13.5`, empty where it is not known. work: an empty folder.

        make_twin: for a guest whose own interpreter this host cannot run, of a version.
        """
        self.version = version
        self._release = release
        self.library = f"usr/lib/python{version}"
        self.program = f"usr/bin/python{version}"
        self._tree = tree
        self._work = work
        self._make_twin = make_twin
        self._architecture = architecture
        self._libraries = f"usr/lib/{architecture.triplet}/"
        self._loader = self._libraries + posixpath.basename(architecture.loader)
        self._root = work / "root"
        self._sources: dict[str, bytes] = {}
        # The names of all modules of the packages that the listed ones are from.
        self._packaged: set[str] = set()
        self._interpreter: Interpreter | None = None

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
                if node.kind is not FileKind.FILE or not path.startswith(prefix):
                    continue
                name = _module_name(path.removeprefix(prefix))
                self._packaged.add(name)
                if name and _is_listed(name, names):
                    self._add_module(path, node)

    def take_package(self, name: str, sources: Mapping[str, bytes], *, of_debian: bool = False) -> None:
        """Adds a package of our own beside the library, where `-I -S` finds it; sources are kept beside their .pyc.

        of_debian: where Debian's own packages are, for programs of the guest's; with docstrings, which may be a
        program's help.
        """
        for path, text in sources.items():
            guest_path = f"{DEBIAN_PACKAGES if of_debian else self.library}/{name}/{path}"
            self._tree.add(guest_path, file_node(text))
            if path.endswith(".py"):
                self._sources[guest_path] = text

    def add_command(self, name: str) -> None:
        """Makes a package of ours a command of root's, without a site's modules and without .pyc files of its own."""
        text = f"#!/{self.program} -ISB\nimport sys\nfrom {name}.__main__ import main\nsys.exit(main())\n"
        self._tree.add(f"usr/sbin/{name}", file_node(text.encode(), 0o755))

    def compile(self) -> None:
        """Compiles everything taken, in sorted order, and puts the .pyc files into the tree."""
        interpreter = self._find_interpreter()
        jobs, outputs = [], {}
        for index, guest_path in enumerate(sorted(self._sources)):
            output = self._work / f"{index}.pyc"
            outputs[guest_path] = output
            level = "0" if guest_path.startswith(DEBIAN_PACKAGES) else "2"
            self._write(guest_path, self._sources[guest_path])
            jobs += [str(self._root / guest_path), str(output), f"/{guest_path}", level]
        (self._work / "jobs").write_text("\n".join(jobs) + "\n")
        interpreter.run(_COMPILER, str(self._work / "jobs"), cwd=self._root)
        for guest_path, output in outputs.items():
            self._tree.add(self._pyc_path(guest_path), file_node(output.read_bytes()))

    def forget_compiled(self, path: str) -> None:
        """Removes the .pyc of a file that a recipe replaces. Python would trust it instead of the file."""
        if path.endswith(".py"):
            self._tree.remove(path + "c")
            self._tree.remove(self._cached_path(path))

    def check_imports(self, modules: Sequence[str], needs: Needs) -> None:
        """Sees that each listed module, and what vshd needs, can be imported with nothing but what was taken.

        Where the guest's interpreter runs here, it imports them. Raises BuildError naming what is missing.
        """
        listed = (*modules, *needs.modules)
        interpreter = self._find_interpreter()
        if interpreter.is_guests:
            try:
                interpreter.run(_IMPORTER, *listed, *map("codec:{}".format, needs.codecs), cwd=self._root)
            except CommandError as error:
                raise _explain_missing(error.details.splitlines()[-1], error.details) from error
            return
        job = self._describe_library() | {
            "listed": listed,
            "codecs": {name: _find_codec_module(name) for name in needs.codecs},
        }
        answer = interpreter.run_file(Path(imports.__file__), json.dumps(job).encode(), cwd=self._root)
        missing = [str(line) for line in json.loads(answer)]
        if missing:
            raise _explain_missing(missing[-1], "\n".join(missing))

    def _describe_library(self) -> dict[str, object]:
        program = self._tree.find(self.program)
        modules = {self._name(path) for path, _ in self._tree.walk() if path.startswith(self.library + "/")}
        modules |= imports.find_built_in(program.data if program else b"")
        sources = {self._name(path): text.decode(errors="replace") for path, text in self._sources.items()}
        return {
            "sources": sources,
            "modules": sorted(modules | sources.keys()),
            "packaged": sorted(self._packaged),
        }

    def _name(self, path: str) -> str:
        return _module_name(path.removeprefix(self.library + "/"))

    def _add_module(self, path: str, node: Node) -> None:
        if not path.endswith(".py"):
            self._tree.add(path, Node(FileKind.FILE, 0o644, node.data))
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

    def _find_interpreter(self) -> Interpreter:
        if self._interpreter is None:
            self._interpreter = self._choose_interpreter()
        return self._interpreter

    def _choose_interpreter(self) -> Interpreter:
        bootstrap = f"{self.library}/importlib/_bootstrap_external.py"
        node = self._tree.find(bootstrap)
        magic = find_magic(self._sources.get(bootstrap) or (node.data if node else b""))
        host = find_host_interpreter(self._release, magic) if self._release and magic else None
        if host is not None:
            return host
        if self._make_twin is not None:
            return self._make_twin(self.version)
        self._write_root()
        return make_interpreter(self._root, self.program, self._architecture, is_guests=True)

    def _write_root(self) -> None:
        """Writes what the guest's interpreter needs to run here: itself, its libraries, its modules as sources."""
        for path, node in self._tree.walk():
            if node.kind is FileKind.FILE and path.startswith((self._libraries, self.library + "/", self.program)):
                self._write(path, node.data)
            elif node.kind is FileKind.SYMLINK and path.startswith(self._libraries):
                library = self._tree.resolve(path)
                if library is not None and library.kind is FileKind.FILE:
                    self._write(path, library.data)
        for path, text in self._sources.items():
            self._write(path, text)

    def _write(self, path: str, data: bytes) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(0o755 if path in (self.program, self._loader) else 0o644)


def _find_codec_module(name: str) -> str:
    """Returns the module in which Python looks for a codec (encodings.search_function)."""
    normal = encodings.normalize_encoding(name).lower()
    return f"encodings.{aliases.get(normal, normal)}"


def _explain_missing(what: str, details: str) -> BuildError:
    return BuildError(
        f"the guest's Python lacks a module or codec: {what}",
        details=details,
        hint="add the missing module to the recipe's `python_modules` (a codec is encodings.NAME), or its "
        "library to [extract]",
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
