"""Messages in ChromeOS's words, which its scripts look for, are explained where a user looks for them."""

import ast
import re
from collections.abc import Iterator

from tests.docs.pages import CHECKOUT

CHROMEOS = re.compile(r"Exactly one of|Failed to |Port .* is not|(vshd: )?ERROR: (unknown|illegal)")


def find_messages() -> Iterator[str]:
    """Every such text of vsh and vshd, with `x` for each value in it."""
    for package in ("vsh", "vshd"):
        for path in (CHECKOUT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
            for node in nodes:
                parts = node.values if isinstance(node, ast.JoinedStr) else [node] if id(node) not in pieces else []
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts)
                if CHROMEOS.match(text):
                    yield text.removeprefix("vshd: ")


def find_rows() -> list[str]:
    """The messages of the table, as patterns: `...` stands for any text."""
    page = (CHECKOUT / "docs/howto/debugging.md").read_text()
    table = page.partition("## Errors in ChromeOS's words\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    return [re.escape(text).replace(re.escape("..."), ".*") for cell in cells[2:] for text in cell.split(", ")]


def test_messages_of_chromeos_are_explained() -> None:
    messages = set(find_messages())
    assert len(messages) > 15
    rows = find_rows()
    assert {text for text in messages if not any(re.match(row, text) for row in rows)} == set()
    assert [row for row in rows if not any(re.match(row, text) for text in messages)] == []
