"""Unpacks gzip, xz and zstd archives into files of the workplace, up to a ceiling, and hashes both sides.

A reader by offset needs an archive that is not packed. One that is not packed already is used where it is.
"""

import hashlib
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmkit.errors import BuildError, CommandError
from vmkit.roots.extents import CHUNK_BYTES, Extent
from vmkit.roots.source import HEAD_BYTES, Shape, recognise
from vmkit.roots.workplace import Workplace
from vmkit.run import open_output

# zlib.h: a window of 32 KiB (15), and a gzip header (+ 16).
_GZIP = 15 + 16
# `xz -9` needs 65 MiB to unpack.
_XZ_MEMORY_BYTES = 256 << 20
# 32 GiB on a slow disk.
_ZSTD_TIMEOUT_S = 3600.0
_AGAIN = "make or download it again"
_CUT_OFF = "it ends in the middle of its data"


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An archive that can be read by offset, and the digests of its bytes before and after, in hexadecimal."""

    archive: Extent
    packed_digest: str
    digest: str


def find_shape(archive: Extent, name: str) -> Shape:
    """What an archive is by its first bytes. Raises ConfigError for what is no root."""
    return recognise(archive.read(0, HEAD_BYTES), name)


def hash_extent(archive: Extent, algorithm: str = "sha256") -> str:
    """The digest of a part of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    for chunk in archive.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Extent, name: str, place: Workplace, algorithm: str = "sha256") -> Unpacked:
    """The archive unpacked; itself where it is not packed. algorithm: of packed_digest.

    Raises BuildError for a damaged archive or one that becomes too large, HostError without the program zstd.
    """
    packed, unpacked = hashlib.new(algorithm), hashlib.sha256()
    chunks = _hash(archive.chunks(), packed)
    match find_shape(archive, name):
        case Shape.GZIP:
            pieces = _unpack_gzip(chunks)
        case Shape.XZ:
            pieces = _unpack_xz(chunks)
        case Shape.ZSTD:
            pieces = _unpack_zstd(chunks, place)
        case _:
            digest = hash_extent(archive)
            packed_digest = digest if algorithm == "sha256" else hash_extent(archive, algorithm)
            return Unpacked(archive, packed_digest, digest)
    try:
        result = place.keep(_hash(place.budget.limit(pieces), unpacked))
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise BuildError(f"{name} is damaged: {error}", hint=_AGAIN) from error
    except CommandError as error:
        raise BuildError(f"{name} is damaged: {error.brief}", details=error.details, hint=_AGAIN) from error
    # What follows the packed data is of the archive, too.
    for _ in chunks:
        pass
    return Unpacked(result, packed.hexdigest(), unpacked.hexdigest())


def _hash(chunks: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _unpack_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """One gzip member after the other (eStargz and pigz make many), in pieces of CHUNK_BYTES at most."""
    gzip = zlib.decompressobj(_GZIP)
    for chunk in chunks:
        data = chunk
        while data:
            if gzip.eof:
                # Zeros fill up the last block of a tape.
                data = data.lstrip(b"\0")
                if not data:
                    break
                gzip = zlib.decompressobj(_GZIP)
            yield gzip.decompress(data, CHUNK_BYTES)
            data = gzip.unused_data if gzip.eof else gzip.unconsumed_tail
    while not gzip.eof:
        piece = gzip.decompress(gzip.unconsumed_tail, CHUNK_BYTES)
        if not piece and not gzip.eof:
            raise EOFError(_CUT_OFF)
        yield piece


def _unpack_xz(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """One stream after the other, as `cat` leaves them."""
    xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES)
    for chunk in chunks:
        data = chunk
        while data or not (xz.eof or xz.needs_input):
            if xz.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES)
            yield xz.decompress(data, CHUNK_BYTES)
            data = xz.unused_data if xz.eof else b""
    if not xz.eof:
        raise EOFError(_CUT_OFF)


def _unpack_zstd(chunks: Iterable[bytes], place: Workplace) -> Iterator[bytes]:
    """By the program zstd: Python 3.11 has none. The packed bytes are copied first, for they may be part of a file."""
    copy = place.keep(chunks).file.path
    with open_output(["zstd", "-d", "-c", "-q", copy], timeout_s=_ZSTD_TIMEOUT_S, package="zstd") as output:
        while piece := output.read(CHUNK_BYTES):
            yield piece
