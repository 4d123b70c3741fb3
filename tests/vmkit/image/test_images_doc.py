"""docs/reference/recipes.md tells the truth: every key is in its table, and its example is a recipe."""

import re
from pathlib import Path

import pytest

from vmkit.image.recipe.config import load_image
from vmkit.image.recipe.settings import SETTINGS
from vmkit.image.wall.spec import WALL_KEYS

DOC = Path(__file__).parents[3] / "docs/reference/recipes.md"


@pytest.fixture
def doc() -> str:
    return DOC.read_text()


def test_table_has_every_key_once(doc: str) -> None:
    table = doc[doc.index("## Keys") : doc.index("## The wall")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(SETTINGS)


def test_wall_table_has_every_key_once(doc: str) -> None:
    table = doc[doc.index("## The wall") : doc.index("## Templates")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(WALL_KEYS)


def test_example_is_a_recipe(doc: str, tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", doc, re.DOTALL)
    assert example is not None
    (tmp_path / "my.toml").write_text(example[1])
    spec = load_image(str(tmp_path / "my.toml"))
    assert spec.packages == ("strace",)
    assert spec.hook is not None
    assert spec.hook.value.lstrip().startswith("#!/bin/sh")
