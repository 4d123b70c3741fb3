"""A release: sdist and wheel, installed into a clean virtual environment, and the programs tried from there.

Nothing is fetched: what the project depends on is lent by the environment of the tests.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vshd.wire.version import __version__

CHECKOUT = Path(__file__).resolve().parents[1]
DEADLINE_S = 120
PAGES = {"man1/vmkit.1", "man1/vsh.1", "man8/vshd.8"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=CHECKOUT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def home(request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment with the project in it, from either file."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    # A line of a .pth file is a folder to look in; the project's own editable install there is not followed.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (file,) = dist.glob("*.whl" if request.param == "wheel" else "*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "--disable-pip-version-check", "--quiet"]
    words = ["install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", str(file)]
    subprocess.run([*pip, *words], check=True, capture_output=True)
    yield home


def run(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PATH": f"{home}/bin:{os.environ['PATH']}"}
    return subprocess.run(words, env=env, cwd=home, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize("program", ["vmkit", "vsh", "vshd"])
def test_programs_are_there_and_tell_the_one_version(home: Path, program: str) -> None:
    done = run(home, program, "--version")
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout + done.stderr


def test_plan_of_an_image_can_be_made(home: Path) -> None:
    done = run(home, "vmkit", "build", "--dry-run", "tiny")
    assert done.returncode == 0, done.stderr
    assert "pack the initramfs" in done.stdout


def test_manual_pages_and_completions_are_where_they_are_looked_for(home: Path) -> None:
    assert {str(path.relative_to(home / "share/man")) for path in (home / "share/man").rglob("*.?")} == PAGES
    for path in (
        "bash-completion/completions/vmkit",
        "zsh/site-functions/_vmkit",
        "fish/vendor_completions.d/vmkit.fish",
    ):
        assert (home / "share" / path).is_file()
    assert "complete" in run(home, "bash", "-c", 'eval "$(vmkit completion bash)"; complete -p vmkit').stdout


def test_locks_travel_with_their_recipes(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"vmkit/data/images/tiny.toml", "vmkit/data/images/tiny.lock"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_can_be_tested_and_built_from(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Dockerfile", "Makefile", "LICENSE", "tests/conftest.py", "CHANGELOG.md", ".ci/run"} <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


def test_changelog_knows_the_version() -> None:
    assert f"## {__version__}" in (CHECKOUT / "CHANGELOG.md").read_text()
