"""A Markdown page as tests see it: its links, its anchors, its code blocks, its sentences.

Owns the reading of pages and the two words that a block's info string may hold behind the language: `run` (a test
replays the block) and `file=NAME` (the block is that file). Knows nothing of what a page is about.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

CHECKOUT = Path(__file__).resolve().parents[2]
# Stands for inline code: one word, however long it is.
CODE = "CODE"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. line: of its fence, from 1 on. words: what the info string holds behind the language."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def is_run(self) -> bool:
        """A test replays it."""
        return "run" in self.words

    @property
    def file(self) -> str | None:
        """The file whose content it is."""
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)


@dataclass(frozen=True, slots=True)
class Page:
    """A parsed page. sentences: those outside of tables, with the line their paragraph begins at. cells: of tables."""

    path: Path
    blocks: tuple[Block, ...]
    links: tuple[str, ...]
    anchors: frozenset[str]
    sentences: tuple[tuple[int, str], ...]
    cells: tuple[tuple[int, str], ...] = field(default=())


def find_pages() -> list[Path]:
    """Every Markdown file of the checkout that is not ignored."""
    return [path for path in find_files() if path.suffix == ".md"]


def find_files() -> list[Path]:
    """Every file of the checkout that git does not ignore. Without git: every file that no tool made."""
    argv = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(argv, capture_output=True, check=False) if (CHECKOUT / ".git").exists() else None
    if done is None or done.returncode:
        found = (path for path in CHECKOUT.rglob("*") if not _is_made(path.relative_to(CHECKOUT)))
    else:
        found = (CHECKOUT / name for name in done.stdout.decode().split("\0") if name)
    return sorted(path for path in found if path.is_file())


def _is_made(path: Path) -> bool:
    made = {"build", "dist", "test-evidence", "vmkit-results", "__pycache__", ".venv", ".git"}
    return bool(made.intersection(path.parts)) or path.parts[0].endswith("_cache")


def read_page(path: Path) -> Page:
    """Parses a page as GitHub would."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(path.read_text())
    sentences: list[tuple[int, str]] = []
    cells: list[tuple[int, str]] = []
    for line, inline, place in _find_inlines(tokens):
        if place != "heading":
            (cells if place == "table" else sentences).extend(
                (line, text) for text in split_sentences(_flatten(inline))
            )
    return Page(
        path=path,
        blocks=tuple(_make_block(token) for token in tokens if token.type == "fence"),
        links=tuple(_find_links(tokens)),
        anchors=frozenset(_find_anchors(tokens)),
        sentences=tuple(sentences),
        cells=tuple(cells),
    )


# Requests of roff that begin a new paragraph, and those whose arguments are words of the text.
_ROFF_BREAKS = re.compile(r"\.(TP|P|SH|SS|RS|RE|EX|EE|SY|YS|TS|TE|TH)\b")
_ROFF_WORDS = re.compile(r"\.(?:B|I|BR|BI|IR|IB|RB|RI)\s+(.*)")


def read_manual(path: Path) -> list[tuple[int, str]]:
    """The sentences of a manual page, with the line that their paragraph begins at. Tags, headings, examples: none."""
    paragraphs: list[tuple[int, list[str]]] = [(1, [])]
    is_example = is_tag = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if _ROFF_BREAKS.match(line):
            is_example = line.startswith((".EX", ".SY")) or (is_example and not line.startswith((".EE", ".YS")))
            is_tag = line.startswith(".TP")
            paragraphs.append((number + 1, []))
        elif is_tag:
            is_tag = False
        elif not is_example and (words := _ROFF_WORDS.match(line)):
            # As one word, or what stands for code.
            paragraphs[-1][1].append(f"{CODE}{words[1][-1] if words[1][-1] in '.,;:)' else ''}")
        elif not is_example and not line.startswith("."):
            paragraphs[-1][1].append(re.sub(r"\\f[BIRP]|\\&", "", line).replace("\\-", "-"))
    return [(line, text) for line, lines in paragraphs for text in split_sentences(" ".join(lines))]


def split_sentences(text: str) -> list[str]:
    """Splits at the ends of sentences: a mark and white space behind it."""
    return [part.strip() for part in re.split(r"(?<=[.!?])[\"')]*\s+", text) if part.strip()]


def count_words(sentence: str) -> int:
    """A dash that stands alone is not a word."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def _make_block(token: Token) -> Block:
    language, *words = token.info.split() or [""]
    return Block(language, tuple(words), token.content, (token.map or [0])[0] + 1)


def _find_inlines(tokens: list[Token]) -> Iterator[tuple[int, Token, str]]:
    """Each inline token with its line and where it stands: text, heading or table."""
    place, line = "text", 1
    for token in tokens:
        line = token.map[0] + 1 if token.map else line
        if token.type in ("heading_open", "table_open"):
            place = token.type.removesuffix("_open")
        elif token.type in ("heading_close", "table_close"):
            place = "text"
        elif token.type == "inline":
            yield line, token, place


def _flatten(inline: Token) -> str:
    """The text a reader sees, with CODE for code."""
    pieces = {"code_inline": CODE, "softbreak": " ", "hardbreak": " "}
    children = (child for child in inline.children or () if child.type != "html_inline")
    return "".join(pieces.get(child.type, child.content) for child in children)


def _find_links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        for child in token.children or ():
            name = {"link_open": "href", "image": "src"}.get(child.type)
            if name is not None:
                yield str(child.attrs[name])


def _find_anchors(tokens: list[Token]) -> Iterator[str]:
    """GitHub's: lower case, spaces become dashes, marks go, a number for the second of a name."""
    seen: dict[str, int] = {}
    for _, inline, place in _find_inlines(tokens):
        if place == "heading":
            text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            number = seen.get(slug, -1) + 1
            seen[slug] = number
            yield f"{slug}-{number}" if number else slug
