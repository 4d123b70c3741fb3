"""Every link of every page leads to a file and a heading that exist, and the index leads to every page."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import CHECKOUT, find_files, find_pages, read_page

PAGES = {path: read_page(path) for path in find_pages()}
IDS = [str(path.relative_to(CHECKOUT)) for path in PAGES]
INDEX = CHECKOUT / "docs/README.md"
# A path of a page or an example, wherever it is written: in a comment, a message, a manual page.
REFERENCE = re.compile(r"(?<![\w/.-])(?:docs|examples)/[\w./-]+\.(?:md|svg|toml|py|json|[18])\b")
# Names in examples and tests that no file has, and those of other projects.
ELSEWHERE = {"docs/PAGE.md"}


def resolve(page: Path, link: str) -> tuple[Path, str]:
    """The file that a link leads to, and the heading in it."""
    target, _, anchor = link.partition("#")
    return ((page.parent / target).resolve() if target else page), anchor


def is_local(link: str) -> bool:
    return not re.match(r"[a-z]+:", link)


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in filter(is_local, PAGES[path].links):
        target, anchor = resolve(path, link)
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and (target not in PAGES or anchor not in PAGES[target].anchors):
            wrong.append(f"{link}: no such heading")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_to_the_world_are_encrypted_and_whole(path: Path) -> None:
    for link in PAGES[path].links:
        assert is_local(link) or re.fullmatch(r"https://[\w.-]+(/[^\s<>]*)?", link), link


def test_paths_of_pages_in_code_and_text_exist() -> None:
    wrong = []
    for path in find_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            names = REFERENCE.findall(line.replace("\\-", "-"))
            missing = [name for name in names if not (CHECKOUT / name).exists() and name not in ELSEWHERE]
            wrong += [f"{path.relative_to(CHECKOUT)}:{number}: {name}" for name in missing]
    assert not wrong, "\n".join(wrong)


def test_index_leads_to_every_page() -> None:
    """Over any number of links. Of the examples it leads to each folder; a folder's own page is found there."""
    reached, waiting = set(), [INDEX]
    while waiting:
        page = waiting.pop()
        if page in reached or page not in PAGES:
            continue
        reached.add(page)
        for link in filter(is_local, PAGES[page].links):
            target = resolve(page, link)[0]
            waiting.append(target / "README.md" if target.is_dir() else target)
    below = {path for path in PAGES if path.is_relative_to(CHECKOUT / "docs")}
    assert below - reached == set()


def test_readme_leads_to_the_index() -> None:
    links = {resolve(CHECKOUT / "README.md", link)[0] for link in PAGES[CHECKOUT / "README.md"].links}
    assert INDEX in links or INDEX.parent in links


def test_comparison_links_each_tool_that_it_names() -> None:
    text = (CHECKOUT / "docs/explanation/comparison.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| | vmkit |"))
    names = [name.strip().replace("NixOS driver", "NixOS test driver") for name in row.strip("| ").split("|")[1:]]
    assert len(names) >= 7
    for name in names:
        assert f"[{name}](https://" in text, name


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `up` may say: 1, 2 & 3\n\n## The wall\n\ntext\n\n## The wall\n")
    assert read_page(page).anchors == {"what-up-may-say-1-2--3", "the-wall", "the-wall-1"}
