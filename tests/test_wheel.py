"""What pip installs is whole: recipes and templates travel in the wheel, and the programs find them there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project installed from a wheel of this checkout; nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run(site: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-P", *words], env=env, capture_output=True, text=True, check=False)


def test_wheel_is_what_runs(installed: Path) -> None:
    done = run(installed, "-c", "import vmkit, vsh, vshd; print(vmkit.__file__, vsh.__file__, vshd.__file__)")
    paths = done.stdout.split()
    assert len(paths) == 3, done.stderr
    assert all(path.startswith(str(installed)) for path in paths), paths


def test_wheel_brings_images_and_templates(installed: Path) -> None:
    done = run(installed, "-m", "vmkit", "images")
    assert "tiny" in done.stdout
    templates = installed / "vmkit" / "data" / "templates"
    shipped = {path.relative_to(ROOT / "templates") for path in (ROOT / "templates").rglob("*.j2")}
    assert {path.relative_to(templates) for path in templates.rglob("*.j2")} == shipped


@pytest.mark.parametrize("program", ["vmkit", "vsh"])
def test_wheel_programs_tell_one_version(installed: Path, program: str) -> None:
    done = run(installed, "-m", program, "--version")
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout + done.stderr
