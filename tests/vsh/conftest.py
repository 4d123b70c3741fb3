"""Fixtures of the client's tests: a vshd, and the modes a session can be in."""

import pytest

from tests.vsh.live import Vshd


@pytest.fixture(scope="module")
def vshd(tmp_path_factory):
    """One vshd for a module's tests; it must end cleanly."""
    server = Vshd(tmp_path_factory.mktemp("vshd"))
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def start_vshd(tmp_path):
    """Starts a vshd with flags of the test's own."""
    servers = []

    def start(*flags, **options):
        folder = tmp_path / f"vshd{len(servers)}"
        folder.mkdir()
        servers.append(Vshd(folder, flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        assert server.stop() == 0, server.log


@pytest.fixture(params=["extended", "legacy"])
def mode(request):
    """The flags of vsh that choose a mode."""
    return [] if request.param == "extended" else ["--noextended"]
