"""Docker engines for a test: one that plays a scenario, or none; `docker(...)` is the real program."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vmkit.docker.fake_engine import FakeEngine, Scenario, open_fake_engine

DEADLINE_S = 60
Docker = Callable[..., "subprocess.CompletedProcess[bytes]"]
Play = Callable[..., FakeEngine]


@pytest.fixture
def socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where DOCKER_HOST points; nobody listens there yet. A UNIX socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="vmkit-"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/s")
    for name in ("runtime", "cache"):
        (folder / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"VMKIT_{name.upper()}_DIR", str(folder / name))
    yield folder / "s"
    shutil.rmtree(folder)


@pytest.fixture
def play(socket: Path) -> Iterator[Play]:
    """play(build=[...]) starts an engine that plays this."""
    with ExitStack() as stack:
        yield lambda **scenario: stack.enter_context(open_fake_engine(socket, Scenario(**scenario)))


@pytest.fixture
def docker(socket: Path) -> Docker:
    """docker("run", "--", "true") runs `vmkit docker`."""

    def run(*words: str, stdin: bytes = b"", cwd: Path | None = None) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            command(*words), input=stdin, capture_output=True, timeout=DEADLINE_S, cwd=cwd, check=False
        )

    return run


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmkit", "docker", *words]


def environment() -> dict[str, str]:
    return dict(os.environ)
