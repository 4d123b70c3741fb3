"""What a program can hold about prose: short sentences, lines that fit, summaries that are whole, no riddles."""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.docs.pages import CHECKOUT, count_words, find_pages, read_manual, read_page
from vmkit.cli.main import VERBS, vmkit

MAX_COLUMNS = 100
MAX_WORDS = 35
MAX_MEAN_WORDS = 20
# A mean of fewer sentences says nothing.
MIN_SENTENCES = 10

# Each with what to write instead.
BANNED = {
    r"\b(nobody|somebody|whoever)\b": "name who acts",
    r"\b(shall|lest|wherein|thereof)\b": "must, so that not, in which",
    r"\bcannot be had\b": "state the limit, and the value that was seen",
    r"\b(is|are) let in\b": "may connect",
    r"\bwhat (is|are) there\b": "name it",
    r"\b(vmkit|vsh|vshd|QEMU|gdb|the (program|daemon|monitor|device|guest|kernel|log)) (says|tells|hears|believes)\b": (
        "prints, reports, receives, assumes"
    ),
    r"\bis said\b": "is printed",
    r"\b(e\.g\.|i\.e\.|etc\.)": "for example, that is, and so on",
    r"\bnot un\w+": "no double negation",
}
# Turns of phrase that a reader must read twice. Pages, manual pages and help are free of them.
RIDDLES = {
    r"\bthat (is|are) none\b": "that is not a file, no file",
    r"\bof several,? the\b": "if you give several, the last one counts",
    r"\bas good as\b": "means the same as",
    r"\bwhom\b": "the user who",
    r"\b(may|can) be repeated\b": "you can repeat it",
    r"\bas they (are|came)\b": "unchanged",
    r"\bwins? over\b.*\bthat over\b": "two sentences",
}
PAGES = find_pages()
IDS = [str(path.relative_to(CHECKOUT)) for path in PAGES]


def find_faults(path: Path) -> list[str]:
    """Each rule that a page breaks, with the line."""
    page = read_page(path)
    counts = [count_words(text) for _, text in page.sentences]
    faults = [
        f"{line}: a sentence of {count_words(text)} words, more than {MAX_WORDS}: {text}"
        for line, text in (*page.sentences, *page.cells)
        if count_words(text) > MAX_WORDS
    ]
    if len(counts) >= MIN_SENTENCES and statistics.mean(counts) > MAX_MEAN_WORDS:
        faults.append(f"the mean sentence has {statistics.mean(counts):.1f} words, more than {MAX_MEAN_WORDS}")
    faults += [
        f"{line}: {pattern}: {advice}: {text}"
        for line, text in (*page.sentences, *page.cells)
        for pattern, advice in {**BANNED, **RIDDLES}.items()
        if re.search(pattern, text, re.IGNORECASE)
    ]
    return faults + find_long_lines(path.read_text())


def find_long_lines(text: str) -> list[str]:
    """Lines of more than MAX_COLUMNS. A row of a table cannot be broken, nor can a link or other single word."""
    return [
        f"{number}: {len(line)} columns, more than {MAX_COLUMNS}"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > MAX_COLUMNS and not line.startswith("|") and len(line.split()) > 1 + line.startswith(("-", ">"))
    ]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_page_is_in_plain_words(path: Path) -> None:
    faults = find_faults(path)
    assert not faults, "\n".join(faults)


MANUALS = sorted((CHECKOUT / "docs/man").iterdir())


def find_manual_faults(path: Path) -> list[str]:
    """Each rule that a manual page breaks, with the line of the paragraph."""
    sentences = read_manual(path)
    faults = [
        f"{line}: more than {MAX_WORDS} words: {text}" for line, text in sentences if count_words(text) > MAX_WORDS
    ]
    return faults + [
        f"{line}: {pattern}: {advice}: {text}"
        for line, text in sentences
        for pattern, advice in {**BANNED, **RIDDLES}.items()
        if re.search(pattern, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", MANUALS, ids=[path.name for path in MANUALS])
def test_manual_page_is_in_plain_words(path: Path) -> None:
    assert len(read_manual(path)) > 50
    faults = find_manual_faults(path)
    assert not faults, "\n".join(faults)


def test_rules_find_riddles_in_manual_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.1"
    page.write_text(
        ".SH ONE\nFlags end at the first word that is none.\n.TP\n.B whom\nWhom to log in as.\n"
        ".EX\nof several the last\n.EE\n" + "word\n.B code\n" * 18 + "end.\n"
    )
    assert [fault.split(":")[0] for fault in find_manual_faults(page)] == ["9", "2", "4"]


def test_glossary_is_in_order() -> None:
    words = re.findall(r"^- \*\*(.+?)\*\*", (CHECKOUT / "docs/GLOSSARY.md").read_text(), re.MULTILINE)
    assert len(words) > 30
    assert words == sorted(words, key=str.lower)


GROUPS = {"vmkit": [], "vmkit bench": ["bench"], "vmkit docker": ["docker"]}


@pytest.mark.parametrize("words", GROUPS.values(), ids=GROUPS)
def test_help_cuts_no_summary(words: list[str]) -> None:
    """In a terminal of 80 columns."""
    lines = CliRunner().invoke(vmkit, [*words, "--help"], terminal_width=80).output.splitlines()
    summaries = [line for line in lines if re.match(r"  [a-z][a-z-]*  +[A-Z]", line)]
    assert len(summaries) >= (2 if words else len(VERBS))
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage:")]


def find_help_faults(verb: str) -> list[str]:
    command = vmkit.get_command(click.Context(vmkit), verb)
    assert command is not None
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    texts = [command.help or "" for command in commands]
    texts += [param.help or "" for command in commands for param in command.params if isinstance(param, click.Option)]
    sentences = [part for text in texts for part in re.split(r"(?<=[.!?;])\s+|\n\n", text)]
    faults = [sentence for sentence in sentences if count_words(sentence) > MAX_WORDS]
    return faults + [
        text for text in texts for pattern in (*BANNED, *RIDDLES) if re.search(pattern, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_in_plain_words(verb: str) -> None:
    faults = find_help_faults(verb)
    assert not faults, "\n".join(faults)


ROOMS = sorted({path.parent for package in ("vmkit", "vsh", "vshd") for path in (CHECKOUT / package).rglob("*.py")})


def find_code_faults(path: Path) -> list[str]:
    """Each banned construction in a comment or a docstring, with the line."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    texts = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    texts += [
        (getattr(node, "lineno", 1), " ".join((ast.get_docstring(node) or "").split()))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [
        f"{path}:{line}: {pattern}: {advice}: {text}"
        for line, text in texts
        for pattern, advice in BANNED.items()
        if re.search(pattern, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("room", ROOMS, ids=[str(room.relative_to(CHECKOUT)) for room in ROOMS])
def test_docstrings_and_comments_are_in_plain_words(room: Path) -> None:
    faults = [fault for path in sorted(room.glob("*.py")) for fault in find_code_faults(path)]
    assert not faults, "\n".join(faults)


# The name of a class of errors, or of a value that becomes one.
ERROR = re.compile(r"(Error|Unanswered|Lost|Refused|^End|^Verdict|^KnownEnd)$")
# Passives that hide who acts.
HIDDEN_ACTOR = re.compile(
    r"\b((can|cannot|could not) be \w+(ed|en|wn)"
    r"|(is|are|was|were) (asked|given|passed|told|tried|fetched|wanted|needed|refused|served|tried))\b"
)


# Hints order; they do not ask. A reader cannot answer "is it none?" either.
RIDDLE = re.compile(
    r"^(is|are|was|were|do|does|did) .*\?|: (is|are|was|were|do|does|did) .*\?|\bis none\b|\bit said\b|\bmay tell\b"
    r"|\bthere is none\b|\bas who\b|\b(is|are) there, but\b|\b(can|may) speak\b|\bis no guest's\b|\bwhat runs\b"
)


def find_error_texts(path: Path) -> Iterator[tuple[int, str]]:
    """What a module gives to errors, besides variables: the line, and the text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            texts = [
                part
                for given in (*node.args, *(keyword.value for keyword in node.keywords))
                for part in _find_texts(given)
            ]
            if ERROR.search(name):
                yield from ((node.lineno, text) for text in texts)


def _find_texts(node: ast.expr) -> list[str]:
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@pytest.mark.parametrize("package", ["vmkit", "vsh", "vshd"])
def test_errors_name_who_acts(package: str) -> None:
    texts = [(path, *found) for path in (CHECKOUT / package).rglob("*.py") for found in find_error_texts(path)]
    assert len(texts) > 50
    assert [f"{path}:{line}: {text}" for path, line, text in texts if HIDDEN_ACTOR.search(text)] == []


@pytest.mark.parametrize("package", ["vmkit", "vsh", "vshd"])
def test_errors_hold_no_riddles(package: str) -> None:
    texts = [(path, *found) for path in (CHECKOUT / package).rglob("*.py") for found in find_error_texts(path)]
    patterns = [RIDDLE, *(re.compile(pattern, re.IGNORECASE) for pattern in BANNED)]
    faults = [f"{path}:{line}: {text}" for path, line, text in texts for rule in patterns if rule.search(text)]
    assert faults == []


def test_rules_find_riddles_in_code(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""For whoever\nasks."""\n\n# The guest\nNAME = "nobody"  # not unlike nobody\n')
    assert [fault.split(":")[1] for fault in find_code_faults(module)] == ["5", "5", "1"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("word\n" * 35 + "end.\n", 1),
        ("word\n" * 34 + "end.\n", 0),
        ("word\n" * 30 + "end. " + "word\n" * 30 + "end.\n", 0),
        (("word\n" * 22 + "end.\n") * 10, 1),
        ("This is so whoever comes.\n", 1),
        ("vsh says no. The monitor hears it.\n", 2),
        ("Use it, e.g. here.\n", 1),
        ("# Whoever\n\n`nobody`\n", 0),
        (f"| a |\n| --- |\n| {'word ' * 36} |\n", 1),
        (f"{'é' * 60} {'é' * 60}\n", 1),
        (f"```text\n{'x' * 60} {'x' * 60}\n```\n", 1),
    ],
)
def test_rules_find_what_they_name(text: str, count: int, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert len(find_faults(page)) == count, find_faults(page)
