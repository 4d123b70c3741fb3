"""CONTRIBUTING, the issue templates and the commit hooks name things that exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import CHECKOUT
from tests.docs.test_prose import BANNED

TEXT = (CHECKOUT / "CONTRIBUTING.md").read_text()
MAKEFILE = (CHECKOUT / "Makefile").read_text()
TEMPLATES = sorted((CHECKOUT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
# A person installs these once for all projects.
NOT_LOCKED = {"pre-commit"}
# What a summary of a line must not have, besides.
RIDDLES = (*BANNED, r"\btells?\b", r"\bthere is\b", r"\bof (its|one's) own\b")
# docs.github.com, "Syntax for GitHub's form schema".
KINDS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"`make ([\w-]+)", TEXT))
    assert {"up", "quick", "lint", "unit", "vm", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:|^[\w -]*\b{target}\b[\w -]*:", MAKEFILE, re.MULTILINE), target


def test_help_of_make_lists_every_target_in_plain_words() -> None:
    targets = set(re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[0].split())
    shown = re.findall(r"^\t@echo 'make ([\w-]+) +(.+)'$", MAKEFILE, re.MULTILINE)
    # These are steps of other targets.
    assert {target for target, _ in shown} == targets - {"help", "packages", "test-packages", "slow-packages"}
    for target, text in shown:
        assert not [pattern for pattern in RIDDLES if re.search(pattern, text)], f"{target}: {text}"


def test_shown_commands_are_of_programs_that_it_asks_for() -> None:
    """Of a make target, of a tool that is locked, or of the shell."""
    locked = (CHECKOUT / "requirements/test.lock").read_text()
    shown = re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)
    assert len(shown) >= 4
    for line in shown:
        program, word, *_ = [*shlex.split(line), ""]
        match program:
            case "make":
                assert re.search(rf"^{word}:", MAKEFILE, re.MULTILINE), line
            case ".":
                assert word == ".venv/bin/activate"
            case "export":
                assert word == "VSH_AF_VSOCK=deny"
            case _:
                assert f"\n{program}==" in locked or program in NOT_LOCKED, line


def test_paths_exist() -> None:
    code = re.findall(r"`((?:tests|vmkit|vshd|vsh|docs|images|templates|examples|requirements)/[\w./-]+)`", TEXT)
    assert len(code) > 5
    for path in code:
        assert "NAME" in path or (CHECKOUT / path).exists(), path


def test_limits_are_those_of_the_configuration() -> None:
    configuration = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert "Markdown have at most 100 columns" in TEXT
    editor = (CHECKOUT / ".editorconfig").read_text()
    assert f"[*.py]\nmax_line_length = {configuration['tool']['ruff']['line-length']}\n" in editor
    assert "[*.md]\nindent_size = 2\nmax_line_length = 100\n" in editor


def test_hooks_run_tools_of_the_project() -> None:
    repositories = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    locked = (CHECKOUT / "requirements/test.lock").read_text()
    assert hooks
    for hook in hooks:
        program, *words = shlex.split(hook["entry"])
        assert program.startswith(".venv/bin/")
        tool = words[1] if program.endswith("python") else program.rpartition("/")[2]
        assert f"\n{tool}==" in locked, tool


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert all(set(link) == {"name", "url", "about"} for link in form["contact_links"])
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in KINDS
        assert field["attributes"]["label"]
