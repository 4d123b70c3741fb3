"""A transfer of the Python API's, with a vshd on this host in the guest's place."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import Vshd
from vmkit.bench.guest import VshGuest
from vmkit.bench.sinks import SOURCE_BLOCK_BYTES
from vmkit.errors import HostError
from vsh.address import Address


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[VshGuest]:
    server = Vshd(tmp_path)
    yield VshGuest(Address.unix(str(server.path)))
    server.stop()


@pytest.mark.parametrize("way", ["out", "in"])
def test_bulk_takes_its_time(guest: VshGuest, way: str) -> None:
    assert 0 < guest.time_bulk(way, 8 * SOURCE_BLOCK_BYTES) < 30


@pytest.mark.parametrize(
    ("script", "told"), [("echo short", "status 0, 6 bytes of 8"), ("echo enough.; exit 3", "status 3, 8 bytes of 8")]
)
def test_bulk_that_does_not_come_has_no_time(guest: VshGuest, script: str, told: str) -> None:
    with pytest.raises(HostError, match=f"'sh' in the guest: {told}"):
        guest.time_session(["sh", "-c", script], b"", 8)
