"""Packs an initramfs in the formats that the kernel unpacks (usr/Kconfig, RD_*), each the same way every time.

What another program packs is unpacked again before it is used: a damaged initramfs would be found by booting only.
"""

import gzip

from vmkit.errors import BuildError
from vmkit.image.formats.lz4 import unpack_lz4
from vmkit.image.formats.packed import unpack_zstd
from vmkit.run import run

_TIMEOUT_S = 300.0


def pack(archive: bytes, compression: str) -> bytes:
    """`archive` as gzip, lz4 or zstd; itself for any other word. Raises BuildError, HostError, CommandError."""
    match compression:
        case "gzip":
            return gzip.compress(archive, 9, mtime=0)
        case "lz4":
            # The kernel reads lz4's legacy frame only.
            packed = run(["lz4", "-l", "-9", "-c"], stdin=archive, timeout_s=_TIMEOUT_S, package="lz4")
            unpack = unpack_lz4
        case "zstd":
            # One thread: the split into jobs would depend on the machine.
            packed = run(["zstd", "-19", "-T1", "-q", "-c"], stdin=archive, timeout_s=_TIMEOUT_S, package="zstd")
            unpack = unpack_zstd
        case _:
            return archive
    try:
        is_whole = unpack(packed, len(archive)) == archive
    except BuildError as error:
        raise _explain(compression, error.brief) from error
    if not is_whole:
        raise _explain(compression, f"{len(packed)} bytes that unpack to something else")
    return packed


def _explain(program: str, what: str) -> BuildError:
    return BuildError(
        f"'{program}' ended with success, and did not pack the initramfs",
        details=what,
        hint=f"see which programs have that name: type -a {program}",
    )
