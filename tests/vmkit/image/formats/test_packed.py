"""What is packed is unpacked up to a ceiling; damage is an error."""

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats.packed import unpack_gzip, unpack_xz, unpack_zstd

Unpack = Callable[[bytes, int], bytes]


def pack_zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


CASES = [
    pytest.param(gzip.compress, unpack_gzip, id="gzip"),
    pytest.param(lzma.compress, unpack_xz, id="xz"),
    pytest.param(
        pack_zstd, unpack_zstd, id="zstd", marks=pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd")
    ),
]


@pytest.mark.parametrize(("pack", "unpack"), CASES)
def test_packed_data_is_unpacked_up_to_a_ceiling(pack: Callable[[bytes], bytes], unpack: Unpack) -> None:
    data = bytes(100_000) + b"end"
    assert unpack(pack(data), len(data)) == data
    with pytest.raises(BuildError, match="more than 100002 bytes when unpacked"):
        unpack(pack(data), len(data) - 1)


@pytest.mark.parametrize(("pack", "unpack"), CASES)
def test_damaged_packed_data_is_an_error(pack: Callable[[bytes], bytes], unpack: Unpack) -> None:
    packed = pack(bytes(range(256)) * 400)
    for damaged in (packed[:-8], packed[:3], b"", b"nothing of the kind", packed[:20] + b"\xff" * 20 + packed[40:]):
        with pytest.raises(BuildError, match=r"damaged|ends too early"):
            unpack(damaged, 1 << 20)
