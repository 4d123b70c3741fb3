"""Fixtures of the client's tests: a vshd, and the modes a session can be in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

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
