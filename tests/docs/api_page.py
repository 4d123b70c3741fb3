"""docs/reference/python.md, made from the docstrings of the public names.

`python -m tests.docs.api_page` writes it; with a folder, pdoc makes HTML of the same names there. pdoc reads names,
signatures and docstrings. Owns the page's form alone: its words about a name are that name's docstring.
"""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdoc import doc, render

import vmkit
from tests.docs.pages import CHECKOUT

PAGE = CHECKOUT / "docs/reference/python.md"
COLUMNS = 100
BETWEEN = "# the next block"
# Each name is loaded on first use, and pdoc looks at those that are loaded.
VALUES = {name: getattr(vmkit, name) for name in vmkit.__all__}
# What has another name outside of its module.
PUBLIC_NAMES = {inner: name for name, (_, inner) in vmkit._PUBLIC.items()} | {"NoneType": "None"}
HEAD = """\
# Python API

<!-- Made from docstrings by `make api`. Change those, and not this page. -->

```python
import vmkit
```

[Use vmkit from Python](../howto/python.md) shows how these names work together.

## What is stable

The names on this page, their parameters and the meaning of their results are public. Until version
1.0 they may change in a minor release (0.2, 0.3), and the [changelog](../../CHANGELOG.md) lists
each change. A patch release (0.1.1) changes none of them. From 1.0 on, a public name changes only
in a major release, one minor release after a `DeprecationWarning`.

New optional parameters and new subclasses of the errors may come in any release. All other modules
of `vmkit`, `vsh` and `vshd`, and names that begin with an underscore, may change at any time. The
texts of errors are for people and may change too: use the classes.
"""


def render_page() -> str:
    """The page, as it should be committed."""
    members = doc.Module(vmkit).members
    kinds = {
        name: doc.Class("vmkit", name, value, ("vmkit", name))
        for name, value in VALUES.items()
        if isinstance(value, type)
    }
    constants = [name for name in vmkit.__all__ if isinstance(members[name], doc.Variable) and name not in kinds]
    errors = [name for name, kind in kinds.items() if issubclass(kind.obj, Exception)]
    parts = [HEAD, "## Functions\n"]
    parts += [_render_function(member, "###") for member in members.values() if isinstance(member, doc.Function)]
    parts += [_render_class(kind) for name, kind in sorted(kinds.items()) if name not in errors]
    parts += ["## Errors\n", _render_tree(vmkit.VshError)]
    parts += [_render_class(kinds[name], "###") for name in sorted(errors)]
    parts += ["## Constants\n", f"{', '.join(f'`{name}`' for name in constants)}: as in `subprocess`.\n"]
    return _format_blocks("\n".join(parts))


def render_html() -> str:
    """The same names as one page of HTML, in pdoc's own form."""
    module = doc.Module(vmkit)
    return render.html_module(module, {"vmkit": module})


def _render_tree(kind: type[Exception]) -> str:
    """The errors, each below the one that it is a kind of."""
    lines = []

    def add(kind: type[Exception], depth: int) -> None:
        if kind.__name__ in vmkit.__all__:
            lines.append(f"{'  ' * depth}- [{kind.__name__}](#{kind.__name__.lower()})")
            for inner in sorted(kind.__subclasses__(), key=lambda inner: inner.__name__):
                add(inner, depth + 1)

    add(kind, 0)
    return "\n".join(lines) + "\n"


def _render_class(kind: doc.Class, heading: str = "##") -> str:
    parts = [f"{heading} {kind.name}\n"]
    constructor = kind.members.get("__init__")
    is_error = issubclass(kind.obj, Exception)
    if isinstance(constructor, doc.Function) and ("__init__" in kind.obj.__dict__ or not is_error):
        parts.append(_render_code(f"class {kind.name}:\n    def __init__{constructor.signature}: ..."))
    parts.append(_render_text(kind.docstring))
    if isinstance(constructor, doc.Function) and not _is_generated(constructor.docstring):
        parts.append(_render_text(constructor.docstring))
    for member in _find_members(kind):
        if isinstance(member, doc.Function):
            parts.append(_render_function(member, f"{heading}#", f"{kind.name}."))
        elif isinstance(member, doc.Variable) and isinstance(kind.obj.__dict__.get(member.name), property):
            parts.append(f"{heading}# {kind.name}.{member.name}\n")
            parts.append(_render_text(f"(property) {member.docstring}"))
    return "\n".join(parts)


def _find_members(kind: doc.Class) -> list[doc.Doc[Any]]:
    """Its own public members, and those of bases that are not public themselves."""
    public = {
        getattr(vmkit, name) for name in vmkit.__all__ if name != kind.name and isinstance(getattr(vmkit, name), type)
    }
    inherited = {name for base in kind.obj.__mro__[1:] if base in public for name in base.__dict__}
    return [
        member
        for member in kind.members.values()
        if not member.name.startswith("_") and member.docstring and _is_ours(member)
        if member.name in kind.obj.__dict__ or member.name not in inherited
    ]


def _is_ours(member: doc.Doc[Any]) -> bool:
    return member.taken_from[0].partition(".")[0] in ("vmkit", "vsh", "vshd")


def _is_generated(docstring: str) -> bool:
    """Of object or Exception, whose words say nothing about this class."""
    return not docstring or docstring.startswith("Initialize self")


def _render_function(function: doc.Function, heading: str, owner: str = "") -> str:
    prefix = "@classmethod\n" if function.is_classmethod else "@staticmethod\n" if function.is_staticmethod else ""
    code = _render_code(f"{prefix}def {function.name}{function.signature}: ...")
    return "\n".join([f"{heading} {owner}{function.name}\n", code, _render_text(function.docstring)])


class _Plain(ast.NodeTransformer):
    """Types as one writes them: by their public names, without modules, and with | between alternatives."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        base = ast.unparse(node.value)
        return self.visit_Name(ast.Name(node.attr)) if base.islower() else node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name(PUBLIC_NAMES.get(node.id, node.id))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if not (isinstance(node.value, ast.Name) and node.value.id == "Union" and isinstance(node.slice, ast.Tuple)):
            return node
        first, *others = node.slice.elts
        for other in others:
            first = ast.BinOp(first, ast.BitOr(), other)
        return first


def _render_code(code: str) -> str:
    """A block of Python that format_blocks() has yet to break into lines."""
    code = re.sub(r"<(\w+)\.(\w+): [^>]*>", r"\1.\2", code)
    # Unpack[RunOptions], as the signature of options has it.
    tree = ast.parse(re.sub(r"\*<class '[\w.]*\.(\w+)'>", r"\1", code))
    return f"```python\n{ast.unparse(ast.fix_missing_locations(_Plain().visit(tree)))}\n```\n"


def _format_blocks(page: str) -> str:
    """Formats all blocks of Python as the project's code is, in one run of ruff."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    argv = [sys.executable, "-m", "ruff", "format", "--quiet", "--line-length", str(COLUMNS), "-"]
    code = f"\n{BETWEEN}\n".join(blocks)
    done = subprocess.run(argv, input=code, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    formatted = iter(done.stdout.split(BETWEEN))
    return re.sub(r"```python\n.*?```", lambda _: f"```python\n{next(formatted).strip()}\n```", page, flags=re.DOTALL)


def _render_text(docstring: str) -> str:
    return "\n\n".join(_render_paragraphs(inspect.cleandoc(docstring))) + "\n"


def _render_paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    "):
            yield f"```text\n{textwrap.dedent(paragraph)}\n```"
        else:
            escaped = re.sub(r"([<*])", r"\\\1", " ".join(paragraph.split()))
            yield textwrap.fill(escaped, COLUMNS, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(render_page())
    if sys.argv[1:]:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vmkit.html").write_text(render_html())
