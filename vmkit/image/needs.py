"""The parts of the guest's Python that vshd needs, read from its sources: modules that it imports late, and codecs.

A build that starts every program once does not find these: vshd imports some modules only when a session needs them,
and Python imports a codec when a text is first encoded with it. Pure; knows nothing of images.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Of socket.getaddrinfo(), for a name that is not ASCII.
_IMPLICIT_CODECS = frozenset({"idna"})
_IMPORT_ERRORS = frozenset({"ImportError", "ModuleNotFoundError"})
_CODEC_METHODS = frozenset({"encode", "decode"})


@dataclass(frozen=True, slots=True)
class Needs:
    """modules: to be imported, the package's own included. codecs: to be looked up."""

    modules: tuple[str, ...]
    codecs: tuple[str, ...]


def find_needs(package: str, sources: Mapping[str, bytes]) -> Needs:
    """What a package needs. sources: its files by their path below the package's folder."""
    modules: set[str] = set()
    codecs = set(_IMPLICIT_CODECS)
    for path, text in sources.items():
        if not path.endswith(".py"):
            continue
        modules.add(_module_name(package, path))
        tree = ast.parse(text, path)
        modules |= set(_find_imports(tree))
        codecs |= set(_find_codecs(tree))
    return Needs(tuple(sorted(modules)), tuple(sorted(codecs)))


def _module_name(package: str, path: str) -> str:
    parts = [package, *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _find_imports(node: ast.AST) -> Iterator[str]:
    """The modules of import statements: not of those for types alone, nor of those that may fail."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Try() if any(map(_catches_import_error, child.handlers)):
                continue
            case ast.Import():
                yield from (alias.name for alias in child.names)
            case ast.ImportFrom(module=str(name)):
                yield name
            case _:
                yield from _find_imports(child)


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(name, ast.Name) and name.id in _IMPORT_ERRORS for name in caught)


def _find_codecs(tree: ast.AST) -> Iterator[str]:
    """The names of codecs: arguments of encode() and decode(), and every argument called `encoding`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        names = [word.value for word in node.keywords if word.arg == "encoding"]
        if isinstance(node.func, ast.Attribute) and node.func.attr in _CODEC_METHODS:
            names += node.args[:1]
        for name in names:
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value
