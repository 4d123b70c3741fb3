"""Fixtures of the client's tests: a vshd, and the modes a session can be in."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Unpack

import pytest

from tests.vsh.live import StartVshd, Vshd, VshdOptions


@pytest.fixture(scope="module")
def vshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vshd]:
    """One vshd for a module's tests; it must end cleanly."""
    server = Vshd(tmp_path_factory.mktemp("vshd"))
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def start_vshd(tmp_path: Path) -> Iterator[StartVshd]:
    """Starts a vshd with flags of the test's own."""
    servers: list[Vshd] = []

    def start(*flags: str, **options: Unpack[VshdOptions]) -> Vshd:
        folder = tmp_path / f"vshd{len(servers)}"
        folder.mkdir()
        servers.append(Vshd(folder, flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        assert server.stop() == 0, server.log


@pytest.fixture(params=["extended", "legacy"])
def mode(request: pytest.FixtureRequest) -> list[str]:
    """The flags of vsh that choose a mode."""
    return [] if request.param == "extended" else ["--noextended"]


class Register(Protocol):
    """The fixture registry."""

    def __call__(
        self,
        name: str,
        cid: int,
        *,
        state: str = "ready",
        vsock: str | None = "/run/x.sock",
        alive: bool = True,
        recordings: str | None = None,
        container: dict[str, object] | None = None,
    ) -> None: ...


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    path = tmp_path / "runtime"
    (path / "machines").mkdir(parents=True)
    path.chmod(0o700)
    return path


@pytest.fixture
def registry(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """A registry of machines; register(...) adds a live one."""
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    held = []

    def register(
        name: str,
        cid: int,
        *,
        state: str = "ready",
        vsock: str | None = "/run/x.sock",
        alive: bool = True,
        recordings: str | None = None,
        container: dict[str, object] | None = None,
    ) -> None:
        folder = runtime / "machines" / name
        folder.mkdir()
        record = {"schema": 1, "name": name, "cid": cid, "backend": "user", "state": state, "vsock": vsock, "pid": 1}
        record["recordings"] = recordings
        record["container"] = container
        (folder / "machine.json").write_text(json.dumps(record))
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        held.append(lock)
        if alive:
            fcntl.flock(lock, fcntl.LOCK_EX)

    yield register
    for lock in held:
        os.close(lock)
