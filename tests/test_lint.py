"""Lint, format and types over the whole project, so that one command checks all."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
# mypy without its cache, on a busy machine.
DEADLINE_S = 300
# What these hold is made, or not ours.
MADE = {"build", "dist", "test-evidence"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", *words]
    return subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize(
    "words",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_project_passes(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


# That mypy reads every program and every test, and demands types of all


def find_programs() -> Iterator[Path]:
    """Every Python file of the project, also those without .py."""
    for folder in CHECKOUT.iterdir():
        if folder.name.startswith(".") or folder.name in MADE:
            continue
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            if path.suffix == ".py":
                yield path.relative_to(CHECKOUT)
            elif path.is_file() and not path.suffix:
                with path.open("rb") as file:
                    if b"python" in file.readline(100).partition(b"#!")[2]:
                        yield path.relative_to(CHECKOUT)


def test_mypy_reads_every_program() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["mypy"]
    programs = list(find_programs())
    assert len(programs) > 500
    read = [Path(name) for name in settings["files"]]
    unread = [str(path) for path in programs if not any(path.is_relative_to(parent) for parent in read)]
    assert unread == []
    # What loosens strict for some modules, or leaves them out, would be one of these.
    assert settings["strict"] is True
    assert "exclude" not in settings
    assert {key for table in settings["overrides"] for key in table} == {"module", "ignore_missing_imports"}


def test_check_that_is_off_has_its_reason_beside_it() -> None:
    """The reason stands behind the kinds, as a comment of its own: what mypy cannot see."""
    missing = [
        f"{path}:{number}"
        for path in find_programs()
        for number, line in enumerate((CHECKOUT / path).read_text().splitlines(), 1)
        if re.search(r"# *type: ignore(?!\[[a-z,-]+\]  # \w)\b", line)
    ]
    assert missing == []


@pytest.mark.parametrize("head", ["def test_none():", "def test_one(tmp_path) -> None:", "def test_result(a: int):"])
def test_function_without_types_is_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "test_untyped.py"
    path.write_text(f"{head}\n    pass\n")
    done = run("mypy", "--cache-dir", str(tmp_path / "cache"), str(path))
    assert done.returncode == 1, done.stderr
    assert "[no-untyped-def]" in done.stdout
