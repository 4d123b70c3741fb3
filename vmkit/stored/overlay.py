"""Writes an empty qcow2 disk on top of a base: what a guest writes goes into it, and the base stays as it is.

A header, its tables, and nothing else (QEMU, docs/interop/qcow2.txt). QEMU fills it, and grows its tables.
"""

import os
import struct
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
# One cluster holds the table of the first level: 8 bytes for each table of the second, and 8 there for each cluster.
MAX_DISK_BYTES = (CLUSTER_BYTES // 8) ** 2 * CLUSTER_BYTES
_VERSION = 3
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
# A reference count has 16 bits.
_REFCOUNT_ORDER = 4
# The header, the table of the reference counts, their first block, the table of the first level.
_HEADER_AT, _REFCOUNT_TABLE_AT, _REFCOUNTS_AT, _L1_AT, _CLUSTERS = 0, 1, 2, 3, 4


def write_overlay(path: Path, size_bytes: int, backing: str, backing_format: str) -> None:
    """Writes the disk to a new file of this user's alone, and syncs it.

    size_bytes: what the guest sees, a multiple of 512. backing: the base, as a path from the disk's own folder or from
    the root. Raises OSError.
    """
    assert 0 < size_bytes <= MAX_DISK_BYTES, "its caller has looked"
    assert size_bytes % 512 == 0, "its caller has looked"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(_render_header(size_bytes, os.fsencode(backing), backing_format.encode()))
        file.seek(_REFCOUNT_TABLE_AT * CLUSTER_BYTES)
        file.write(struct.pack(">Q", _REFCOUNTS_AT * CLUSTER_BYTES))
        file.seek(_REFCOUNTS_AT * CLUSTER_BYTES)
        file.write(struct.pack(f">{_CLUSTERS}H", *[1] * _CLUSTERS))
        file.truncate(_CLUSTERS * CLUSTER_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _render_header(size_bytes: int, backing: bytes, backing_format: bytes) -> bytes:
    padded = backing_format.ljust(-(-len(backing_format) // 8) * 8, b"\0")
    extensions = struct.pack(">II", _EXTENSION_BACKING_FORMAT, len(backing_format)) + padded + bytes(8)
    l1_entries = -(-size_bytes // (CLUSTER_BYTES // 8 * CLUSTER_BYTES))
    header = _HEADER.pack(
        b"QFI\xfb", _VERSION,
        _HEADER.size + len(extensions), len(backing), CLUSTER_BITS, size_bytes,
        # No encryption.
        0, l1_entries, _L1_AT * CLUSTER_BYTES, _REFCOUNT_TABLE_AT * CLUSTER_BYTES, 1,
        # No snapshots, and no features that a reader must know.
        0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip
    return header + extensions + backing
