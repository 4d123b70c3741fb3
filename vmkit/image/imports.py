"""Whether a guest's Python has what it will import. Reads sources alone and runs nothing of the guest.

It follows the imports that a module makes when it is imported itself, from the listed modules on. It skips an import
that may fail, or that depends on the system. It cannot find the imports that only a run shows, such as those of an
extension.

As a script it reads a job in JSON from stdin and writes the answer: sources are parsed by an interpreter of their own
version. So it imports nothing of vmkit.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Those of the interpreter's modules that have no PyInit function (CPython's config.c).
_CORE = frozenset(
    {"sys", "builtins", "marshal", "_imp", "_warnings", "_frozen_importlib", "_frozen_importlib_external"}
)
_IMPORT_ERRORS = frozenset({"ImportError", "ModuleNotFoundError", "Exception"})


@dataclass(frozen=True, slots=True)
class Library:
    """What a guest's Python has: sources by module, all modules' names, and those that its packages had besides."""

    sources: Mapping[str, str]
    modules: frozenset[str]
    packaged: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether a module is there, or in the interpreter itself."""
        return name in self.modules or name in _CORE


def find_built_in(program: bytes) -> frozenset[str]:
    """The modules that an interpreter has in itself, of those that have a function PyInit_NAME."""
    return frozenset(name.decode() for name in re.findall(rb"\0PyInit_(\w+)(?=\0)", program))


def find_missing(library: Library, listed: Sequence[str], codecs: Mapping[str, str]) -> list[str]:
    """Returns a line for each missing module. listed: names, with a `?` for an optional one.

    codecs: the module of each codec that must be there.
    """
    missing = [f"codec:{codec}: no module {module}" for codec, module in codecs.items() if not library.has(module)]
    waiting = []
    for name in listed:
        plain = name.removesuffix("?")
        if library.has(plain):
            waiting.append(plain)
        elif plain == name:
            missing.append(f"{name}: No module named '{name}'")
    seen = set(waiting)
    while waiting:
        module = waiting.pop()
        for name in _find_imports(library, module):
            if not library.has(name):
                if name in library.packaged:
                    missing.append(f"{module}: No module named '{name}'")
            elif name not in seen:
                seen.add(name)
                waiting.append(name)
    return sorted(set(missing))


def _find_imports(library: Library, module: str) -> Iterator[str]:
    """The modules that importing a module imports, its packages first."""
    parts = module.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts)))
    text = library.sources.get(module)
    if text is None:
        return
    is_package = any(name.startswith(module + ".") for name in library.modules)
    package = parts if is_package else parts[:-1]
    for statement in _find_statements(ast.parse(text).body):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield from _with_packages(alias.name)
        else:
            base = package[: len(package) - statement.level + 1] if statement.level else []
            name = ".".join([*base, *([statement.module] if statement.module else [])])
            yield from _with_packages(name)
            inner = [f"{name}.{alias.name}" for alias in statement.names]
            # Most of these names are no modules. Those that are must be there.
            yield from (found for found in inner if found in library.packaged or found in library.modules)


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _find_statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run for certain."""
    for statement in body:
        match statement:
            case ast.Import() | ast.ImportFrom():
                yield statement
            case ast.Try() if not any(map(_catches_import_error, statement.handlers)):
                yield from _find_statements([*statement.body, *statement.finalbody])
            case ast.With() | ast.ClassDef():
                yield from _find_statements(statement.body)


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(name is None or (isinstance(name, ast.Name) and name.id in _IMPORT_ERRORS) for name in caught)


def main() -> None:
    """Answers one job."""
    job = json.load(sys.stdin.buffer)
    library = Library(job["sources"], frozenset(job["modules"]), frozenset(job["packaged"]))
    sys.stdout.write(json.dumps(find_missing(library, job["listed"], job["codecs"])))


if __name__ == "__main__":
    main()
