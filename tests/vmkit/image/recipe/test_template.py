"""Templates are strict: what is missing or wrong is told with file and line."""

from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.image.recipe.template import Renderer


def _renderer(tmp_path: Path, text: str, name: str = "fam/x.j2") -> Renderer:
    path = tmp_path / "templates" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Renderer([tmp_path / "templates"])


def test_template_renders_and_keeps_its_last_newline(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "{% if a %}\n{{ a | quote }} $x\n{% endif %}\n")
    assert renderer.render("fam/x.j2", {"a": "it's"}) == "'it'\"'\"'s' $x\n"


def test_missing_variable_names_file_line_and_variable(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "one\n{{ known }}\n{{ hostnam }}\n")
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:3: .*'hostnam' is undefined") as caught:
        renderer.render("fam/x.j2", {"known": 1})
    assert "known" in caught.value.hint


def test_missing_variable_in_an_included_template_names_that_one(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "{% include 'fam/y.j2' %}\n")
    _renderer(tmp_path, "\n{{ gone }}\n", "fam/y.j2")
    with pytest.raises(ConfigError, match=r"fam/y\.j2:2: "):
        renderer.render("fam/x.j2", {})


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "one\n{% if %}\n")
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:2: template syntax: "):
        renderer.render("fam/x.j2", {})


def test_failing_expression_names_file_and_line(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "\n{{ 1 / zero }}\n")
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:2: template: division by zero"):
        renderer.render("fam/x.j2", {"zero": 0})


def test_unknown_template_names_the_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no template 'fam/z\.j2'") as caught:
        _renderer(tmp_path, "").render("fam/z.j2", {})
    assert str(tmp_path / "templates") in caught.value.details


def test_first_folder_wins(tmp_path: Path) -> None:
    for folder in ("mine", "shipped"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text(folder)
    (tmp_path / "shipped/b").write_text("shipped")
    renderer = Renderer([tmp_path / "mine", tmp_path / "shipped"])
    assert (renderer.render("a", {}), renderer.render("b", {})) == ("mine", "shipped")
