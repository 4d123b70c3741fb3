"""Unpacks gzip, xz and zstd, each with a ceiling: the size that a package's file claims is not trusted.

lz4 is vmkit.image.formats.lz4's.
"""

import lzma
import tempfile
import zlib
from pathlib import Path

from vmkit.errors import BuildError, CommandError
from vmkit.run import open_output

# Unpacking 60 MB takes a quarter of a second.
_TIMEOUT_S = 60.0
_APT_HELPER = "/usr/lib/apt/apt-helper"
# zlib.h: a window of 32 KiB (15), and a gzip header (+ 16).
_GZIP = 15 + 16


def unpack_gzip(data: bytes, limit_bytes: int) -> bytes:
    """The content of one gzip member; what follows it is not looked at. Raises BuildError."""
    gzip = zlib.decompressobj(_GZIP)
    try:
        unpacked = gzip.decompress(data, limit_bytes + 1)
    except zlib.error as error:
        raise BuildError(f"damaged gzip data: {error}") from error
    return _check(unpacked, limit_bytes, whole=gzip.eof)


def unpack_xz(data: bytes, limit_bytes: int) -> bytes:
    """The content of one xz stream. Raises BuildError."""
    xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        unpacked = xz.decompress(data, limit_bytes + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise BuildError(f"damaged xz data: {error}") from error
    return _check(unpacked, limit_bytes, whole=xz.eof)


def unpack_zstd(data: bytes, limit_bytes: int) -> bytes:
    """The content of zstd frames, by apt's own program: Python 3.11 cannot, and apt is needed anyway.

    Raises BuildError.
    """
    with tempfile.NamedTemporaryFile(suffix=".zst") as packed:
        packed.write(data)
        packed.flush()
        argv: list[str | Path] = [_APT_HELPER, "-o", "APT::Sandbox::User=", "cat-file", Path(packed.name)]
        try:
            with open_output(argv, timeout_s=_TIMEOUT_S, package="apt") as output:
                return _check(output.read(limit_bytes + 1), limit_bytes, whole=True)
        except CommandError as error:
            raise BuildError(f"damaged zstd data: {error.brief}", details=error.details) from error


def _check(unpacked: bytes, limit_bytes: int, *, whole: bool) -> bytes:
    if len(unpacked) > limit_bytes:
        raise BuildError(f"more than {limit_bytes} bytes when unpacked")
    if not whole:
        raise BuildError("packed data ends too early")
    return unpacked
