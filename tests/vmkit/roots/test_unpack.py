"""Packed archives as gzip, xz and zstd leave them, and those that are cut off, damaged, or become too large."""

import gzip
import hashlib
import lzma
import random
import subprocess

import pytest

from tests.vmkit.roots.archives import make_tar
from vmkit.errors import BuildError
from vmkit.roots.limits import RootLimits
from vmkit.roots.unpack import unpack
from vmkit.roots.workplace import Workplace

DATA = make_tar([("noise", random.Random(1).randbytes(2_500_000)), ("zeros", bytes(5_000_000))])


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, check=True, capture_output=True).stdout


PACKED = {
    "gzip": gzip.compress(DATA, 1),
    "gzip-members": gzip.compress(DATA[:1000]) + gzip.compress(DATA[1000:], 1) + bytes(1024),
    "xz": lzma.compress(DATA, preset=0),
    "xz-streams": lzma.compress(DATA[:1000]) + bytes(8) + lzma.compress(DATA[1000:], preset=0),
    "zstd": zstd(DATA),
    "plain": DATA,
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
def test_archive_is_the_one_that_was_packed(place: Workplace, packed: bytes) -> None:
    found = unpack(place.keep([packed]), "archive", place)
    assert b"".join(found.archive.chunks()) == DATA
    assert found.digest == hashlib.sha256(DATA).hexdigest()
    assert found.packed_digest == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_archive_that_is_cut_off_or_damaged_is_told(place: Workplace, kind: str) -> None:
    packed = PACKED[kind]
    for bad in (packed[:-5], packed[: len(packed) // 2], packed[:1000] + b"\xff" * 64 + packed[1064:]):
        with pytest.raises(BuildError, match="archive is damaged") as caught:
            unpack(place.keep([bad]), "archive", place)
        assert caught.value.hint == "make or download it again"


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_bomb_ends_at_the_limit(place: Workplace, kind: str) -> None:
    """A few kilobytes that claim to be 64 MiB; no more than the limit reaches the disk."""
    zeros = bytes(64 << 20)
    bomb = {"gzip": gzip.compress, "xz": lambda data: lzma.compress(data, preset=0), "zstd": zstd}[kind](zeros)
    assert len(bomb) < 100_000
    place.budget.limits = RootLimits(size_bytes=8 << 20)
    with pytest.raises(BuildError, match="the root is larger than 8 MiB when it is unpacked"):
        unpack(place.keep([bomb]), "archive", place)
    assert sum(path.stat().st_size for path in place.folder.iterdir()) < 10 << 20
