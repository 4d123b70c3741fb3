"""The command line with real images of fake packages and a QEMU that plays scenarios.

`vmkit` runs a verb in this process, which is quick; `program` runs the real program, for what a process is needed for.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.image.conftest import BASE_RECIPE, ArchiveFixture, archive
from tests.vmkit.machine.conftest import fake_qemu, folders
from vmkit.cli.program import _run
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image

__all__ = ["archive", "fake_qemu", "folders"]

DEADLINE_S = 60


@dataclass(frozen=True)
class Done:
    """What a verb left."""

    status: int
    out: str
    err: str


Vmkit = Callable[..., Done]
Program = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def built(archive: ArchiveFixture) -> Iterator[Path]:
    """A folder with a recipe, `my.toml`, and a cache that holds its image."""
    root = Path(tempfile.mkdtemp(prefix="vmkit-"))
    head = f'mirror = "{archive.mirror}"\nkeyring = "{archive.keyring}"\n'
    (root / "my.toml").write_text(head + BASE_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMKIT_CACHE_DIR", str(root / "cache"))
        patch.setenv("VMKIT_STATE_DIR", str(root / "state"))
        archive.trust()
        build_image(load_image(str(root / "my.toml")))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def recipe(built: Path, fake_qemu: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose image is built, in a world whose QEMU is the fake."""
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(built / "cache"))
    return str(built / "my.toml")


@pytest.fixture
def vmkit(folders: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Vmkit:
    """vmkit("list", "--json") as the program would answer; its handling of signals and streams apart."""
    # The option sets it for the process.
    monkeypatch.setenv("VMKIT_DEBUG", "")

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["vmkit", *words])
        capfd.readouterr()
        status = _run()
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Done(status, out, err)

    return run


@pytest.fixture
def program(folders: Path) -> Program:
    """program("list", stdout=...) is the real program."""

    def run(*words: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": DEADLINE_S}
        argv = [sys.executable, "-m", "vmkit", *words]
        return subprocess.run(argv, check=False, **(settings | options))

    return run


@pytest.fixture
def up(recipe: str, vmkit: Vmkit) -> Vmkit:
    """up("ready", "--name", "m"): a machine whose QEMU plays that scenario; it ends with the test (see folders)."""

    def start(scenario: str, *words: str) -> Done:
        return vmkit("up", recipe, "--accel", "tcg", "--backend", "user", "--append", f"fake={scenario}", *words)

    return start
