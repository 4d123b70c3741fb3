"""The code blocks of pages, without a machine: each parses as what it claims to be, and files are those of examples."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import CHECKOUT, Block, Page, find_pages, read_page
from tests.docs.transcript import parse_transcript
from vmkit.image.recipe.config import load_image
from vmkit.matrix.plan import read_matrix

PAGES = [read_page(path) for path in find_pages()]
BLOCKS = [
    pytest.param(block, id=f"{page.path.relative_to(CHECKOUT)}:{block.line}") for page in PAGES for block in page.blocks
]
LANGUAGES = {"console", "sh", "toml", "yaml", "json", "python", "text", "c", "ini"}


@pytest.mark.parametrize("block", BLOCKS)
def test_block_parses(block: Block) -> None:
    assert block.language in LANGUAGES, "a block names its language"
    match block.language:
        case "console":
            assert parse_transcript(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "json":
            json.loads(block.text)
        case "python":
            compile(block.text, "block", "exec")
    assert set(block.words) <= {"run", *(word for word in block.words if word.startswith("file="))}


def find_cache_keys(node: object) -> Iterator[object]:
    """The keys of GitLab's caches and of the steps that use actions/cache, anywhere in a YAML document."""
    if isinstance(node, list):
        for one in node:
            yield from find_cache_keys(one)
    elif isinstance(node, dict):
        if str(node.get("uses", "")).startswith("actions/cache@"):
            yield node["with"]["key"]
        if isinstance(node.get("cache"), dict):
            yield node["cache"]["key"]
        for one in node.values():
            yield from find_cache_keys(one)


def test_cache_keys_of_ci_jobs_follow_the_version_and_the_recipe() -> None:
    """GitHub stores nothing under a key that it has; a fixed key would keep the first image for ever."""
    texts = {
        f"{page.path}:{block.line}": block.text for page in PAGES for block in page.blocks if block.language == "yaml"
    }
    keys = {place: list(find_cache_keys(yaml.safe_load(text))) for place, text in texts.items()}
    assert sum(map(len, keys.values())) >= 4
    for place, found in keys.items():
        for key in map(str, found):
            assert all(word in key for word in ("VMKIT_VERSION", "vm.toml", "vm.lock")), f"{place}: {key}"


def test_tutorial_shows_the_files_of_the_example() -> None:
    page = read_page(CHECKOUT / "docs/tutorial/3-test-in-ci.md")
    shown = {block.file: block.text for block in page.blocks if block.file is not None}
    example = CHECKOUT / "examples/ci-job"
    files = {str(path.relative_to(example)): path.read_text() for path in example.rglob("*") if path.is_file()}
    files.pop("README.md", None)
    assert shown == files


def test_pages_show_recipes_and_matrices() -> None:
    """What the next test reads is there."""
    keys = {
        key for page in PAGES for block in page.blocks if block.language == "toml" for key in tomllib.loads(block.text)
    }
    assert keys >= {"extends", "commands"}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.path.relative_to(CHECKOUT)) for page in PAGES])
def test_recipes_and_matrices_of_a_page_are_valid(page: Page, tmp_path: Path) -> None:
    """All files of a page are written first: recipes refer to them."""
    files = [
        (tmp_path / (block.file or f"block-{number}.toml"), block)
        for number, block in enumerate(page.blocks)
        if block.file is not None or block.language == "toml"
    ]
    for path, block in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    for path, block in files:
        if block.language == "toml":
            keys = tomllib.loads(block.text)
            if "extends" in keys:
                load_image(str(path))
            elif "commands" in keys:
                read_matrix(path)
