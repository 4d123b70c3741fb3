"""Fuzzes all that reads a root of a stranger's: any bytes give a root inside of its file, or a VmkitError, and in time.

Tar members laid over a tree, partition tables, superblocks, qcow2 disks, documents of container images.
Longer than under pytest: python -m tests.fuzz.fuzz_roots --cases 1000000 --seed 1
"""

import hashlib
import json
import random
import struct
import tarfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tests.fuzz.seeded import run_program
from tests.vmkit.roots.archives import Piece, folder, link, make_tar, member
from vmkit.errors import VmkitError
from vmkit.image.formats.tree import FileKind, Tree
from vmkit.roots.disk import choose_root
from vmkit.roots.extents import Extent, HostFile
from vmkit.roots.images import read_image
from vmkit.roots.layers import add_archive, add_layer
from vmkit.roots.limits import Budget, RootLimits
from vmkit.roots.qcow2 import Qcow2Disk, read_header
from vmkit.roots.source import recognise
from vmkit.roots.superblocks import Reader
from vmkit.roots.workplace import Workplace

LIMITS = RootLimits(layers=20, entries=1000, size_bytes=1 << 20, document_bytes=64 << 10)
GOOD = ("a", "a/b", "./a", "a/b/c", "d", "d/e", "l/x", ".wh.a", "a/.wh..wh..opq") * 20
NAMES = (*GOOD, "../x", "/etc", "a/../b", "", "\udcff", "n" * 300)
WORDS = (0, 1, 2, 511, 512, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)


class MemoryFile:
    """Bytes as a HostFile."""

    path = Path("memory")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length] if offset >= 0 and length > 0 else b""


def make_extent(data: bytes) -> Extent:
    return Extent(cast(HostFile, MemoryFile(data)), 0, len(data))


def spoil(rng: random.Random, data: bytearray, places: int = 4) -> bytes:
    """Some bytes and words at random, and sometimes an end that is missing."""
    for _ in range(rng.randrange(places)):
        if not data:
            break
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            word = struct.pack(rng.choice(("<Q", ">Q", "<I", ">I")), rng.choice(WORDS) & 0xFFFFFFFF)
            data[at : at + len(word)] = word
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


# Tar


def make_piece(rng: random.Random) -> Piece:
    name = rng.choice(NAMES)
    fields = {
        key: value
        for key, value in (
            ("GNU.sparse.map", rng.choice(("0,5", "5,5,20,5", "5,1,0,1", "0", ""))),
            ("GNU.sparse.size", rng.choice(("5", "30", "99999999999999999999"))),
            ("SCHILY.xattr.user.x", "y" * rng.randrange(20)),
            ("mtime", rng.choice(("1.5", "-3", "x", "9" * 30))),
            ("uid", rng.choice(("0", "4294967295", "-1"))),
            ("path", name),
        )
        if rng.random() < 0.1
    }
    kind = rng.randrange(6)
    if kind == 0:
        return folder(name, pax_headers=fields)
    if kind == 1:
        return link(name, rng.choice(("a", "..", "/", "a/b", "l")))
    if kind == 2:
        return link(name, rng.choice(NAMES), tarfile.LNKTYPE)
    if kind == 3:
        return member(name, rng.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"Q")), devmajor=1, pax_headers=fields)
    return member(name, uid=rng.choice((0, 1000, 1 << 31)), pax_headers=fields), rng.randbytes(rng.randrange(1, 700))


def make_archive(rng: random.Random) -> bytes:
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    try:
        data = bytearray(make_tar([make_piece(rng) for _ in range(rng.randrange(1, 6))], form))
    except ValueError:
        # tarfile refuses to write what this wanted to be read.
        return rng.randbytes(1024)
    if rng.random() < 0.6:
        data = bytearray(spoil(rng, data))
        for at in range(0, len(data) - 511, 512):
            # A wrong checksum would be all that is looked at.
            if data[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
                total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
                data[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(data)


def run_tar(rng: random.Random) -> bool:
    tree, budget = Tree(merged=False), Budget(LIMITS)
    try:
        for _ in range(rng.randrange(1, 3)):
            rng.choice((add_layer, add_archive))(tree, make_extent(make_archive(rng)), "archive", budget)
    except VmkitError:
        return False
    for path, node in tree.walk():
        parts = path.split("/")
        assert path
        assert not {"", ".", ".."} & set(parts), path
        parent = tree.find("/".join(parts[:-1]))
        assert len(parts) == 1 or (parent is not None and parent.kind is FileKind.DIRECTORY), path
        if node.kind is FileKind.FILE:
            assert sum(map(len, node.chunks())) == node.size_bytes <= LIMITS.size_bytes
    return bool(len(tree))


# Disks


def make_gpt(rng: random.Random, size: int) -> bytes:
    """A disk with a GPT and a file system or two; its checksums are right most of the time."""
    disk = bytearray(size)
    entries = bytearray(128 * 4)
    for number in range(4):
        if rng.random() < 0.5:
            kind = uuid.UUID(
                rng.choice(("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "0fc63daf-8483-4772-8e79-3d69d8477de4"))
            )
            first = rng.choice((34, 40)) if rng.random() < 0.95 else rng.choice((size // 512 - 1, *WORDS))
            last = first + 20 if rng.random() < 0.95 else rng.choice((first, size // 512 - 1, *WORDS))
            words = (first & 0xFFFFFFFFFFFFFFFF, last & 0xFFFFFFFFFFFFFFFF)
            entries[number * 128 : number * 128 + 48] = kind.bytes_le + bytes(16) + struct.pack("<QQ", *words)
    header = bytearray(92)
    count, each = rng.choice((*((4, 128),) * 9, (rng.choice(WORDS) & 0xFFFFFFFF, rng.choice((0, 128, 1 << 31)))))
    struct.pack_into(
        "<8sIIIIQQQQ16sQIII", header, 0, b"EFI PART", 0x10000, 92, 0, 0, 1, 9, 34, 90, b"", 2, count, each, 0
    )
    struct.pack_into("<I", header, 88, zlib.crc32(entries))
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    disk[512 : 512 + 92], disk[1024 : 1024 + len(entries)] = header, entries
    disk[446 + 4], disk[510:512] = 0xEE, b"\x55\xaa"
    return bytes(disk)


def make_mbr(rng: random.Random, size: int) -> bytes:
    disk = bytearray(size)
    for sector in (0, 40, 50):
        for number in range(4):
            status, kind = (0x80 if rng.random() < 0.9 else 7), rng.choice((*(0, 0x83) * 6, 5, 0xEE))
            start, count = rng.choice((*(34, 40) * 6, 10, 1 << 31)), rng.choice((*(20,) * 12, 1, 1 << 31))
            entry = struct.pack("<B3xB3xII", status, kind, start, count)
            disk[sector * 512 + 446 + number * 16 : sector * 512 + 462 + number * 16] = entry
        disk[sector * 512 + 510 : sector * 512 + 512] = b"\x55\xaa"
    return bytes(disk)


def add_file_system(rng: random.Random, disk: bytearray, at: int) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        struct.pack_into(
            "<II16xI28xH", disk, at + 1024, 100, rng.choice((1, 5, 1 << 31)), rng.choice((0, 6, 7)), 0xEF53
        )
    elif kind == 1:
        struct.pack_into("<4s24xH10xQ", disk, at, b"hsqs", 4, rng.choice((96, 4096, 1 << 62)))
    elif kind == 2:
        struct.pack_into("<4s8xB23xI", disk, at + 1024, b"\xe2\xe1\xf5\xe0", 12, rng.choice((1, 1 << 31)))
    elif kind == 3:
        struct.pack_into(">4sIQ", disk, at, b"XFSB", rng.choice((512, 4096, 5)), rng.choice((1, 1 << 62)))
    elif at + (68 << 10) < len(disk):
        struct.pack_into("<Q8x8s40xQ", disk, at + (64 << 10) + 0x30, 64 << 10, b"_BHRfS_M", 4096)


def run_disk(rng: random.Random) -> bool:
    size = rng.choice((60_000, 80 << 10, 100 << 10))
    make: Callable[[random.Random, int], bytes] = rng.choice((make_gpt, make_mbr, lambda _rng, size: bytes(size)))
    data = bytearray(make(rng, size))
    for at in (0, 34 * 512, 40 * 512):
        if rng.random() < (0.2 if not at else 0.6) and at + 2048 < size:
            add_file_system(rng, data, at)
    disk = spoil(rng, data)
    reads = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        assert offset >= 0
        assert length <= 5 << 20
        return disk[offset : offset + length]

    try:
        found = choose_root(read, len(disk), "disk", rng.choice((None, None, 1, 5)))
    except VmkitError:
        return False
    finally:
        assert reads < 20_000
    if found.partition is not None:
        assert 0 < found.partition.offset_bytes + found.partition.size_bytes <= len(disk)
    return True


def make_qcow2(rng: random.Random) -> bytes:
    """A disk of 16 clusters of 512 bytes: data, zeros, compressed ones, and tables that may lead anywhere."""
    disk = bytearray(32 * 512)
    version, features = rng.choice((2, 3, 3)), rng.choice((0, 0, 0, 1 << 4, 1 << 3, 1 << 2))
    backing = rng.choice((0, 0, 0, 104))
    struct.pack_into(">4sIQIIQIIQ", disk, 0, b"QFI\xfb", version, backing, 5, 9, 16 * 512, 0, 1, 512)
    struct.pack_into(">QIIQQQQII", disk, 48, 1024, 1, 0, 0, features, 0, 0, 4, 104)
    struct.pack_into(">Q", disk, 512, 2 * 512 | 1 << 63)
    packed = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = packed.compress(b"words " * 100) + packed.flush()
    disk[31 * 512 : 31 * 512 + len(data[:512])] = data[:512]
    for number in range(16):
        entry = rng.choice((0, 1, (8 + number) * 512 | 1 << 63, 1 << 62 | 31 * 512, rng.getrandbits(64)))
        struct.pack_into(">Q", disk, 1024 + number * 8, entry)
    return spoil(rng, disk)


def run_qcow2(rng: random.Random) -> bool:
    data = make_qcow2(rng)
    read: Reader = make_extent(data).read
    try:
        disk = Qcow2Disk(read_header(read), read)
        at, length = rng.randrange(16 * 512), rng.randrange(3000)
        found = disk.read(at, length)
        assert len(found) == max(0, min(length, disk.size_bytes - at))
    except VmkitError:
        return False
    return True


# Documents


class MemoryStore:
    name = "store"

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def put(self, data: bytes, name: str = "") -> str:
        digest = hashlib.sha256(data).hexdigest()
        self._files[name or f"blobs/sha256/{digest}"] = data
        return f"sha256:{digest}"

    def find(self, name: str) -> Extent | None:
        return make_extent(self._files[name]) if name in self._files else None


def spoil_json(rng: random.Random, value: object) -> object:
    """A document in which some values are of another kind."""
    if rng.random() < 0.03:
        return rng.choice((None, 5, -1, "x", [], {}, "sha256:" + "0" * 64, ["a"], {"a": 1}, "a\0", 1.5, True))
    if isinstance(value, dict):
        return {key: spoil_json(rng, inner) for key, inner in value.items() if rng.random() > 0.01}
    if isinstance(value, list):
        return [spoil_json(rng, inner) for inner in value] * rng.choice((1, 1, 1, 1, 30))
    return value


def run_documents(rng: random.Random) -> bool:
    store = MemoryStore()
    layer = b"a layer"
    digest = store.put(layer)

    def write(value: object, name: str = "") -> dict[str, object]:
        data = spoil(rng, bytearray(json.dumps(spoil_json(rng, value)).encode()), 2 if rng.random() < 0.1 else 1)
        return {"digest": store.put(data, name), "size": len(data), "mediaType": "application/json"}

    settings = {"Env": ["A=b"], "User": "0", "Cmd": ["sh"], "Entrypoint": None, "WorkingDir": "/"}
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [digest]}, "config": settings}
    if rng.random() < 0.5:
        layers = [{"digest": digest, "size": len(layer)}]
        manifest = write({"config": write(config), "layers": layers})
        write({"manifests": [manifest | {"platform": {"os": "linux", "architecture": "amd64"}}]}, "index.json")
    else:
        write(config, "config.json")
        store.put(layer, "layer.tar")
        write([{"Config": "config.json", "RepoTags": ["a:b"], "Layers": ["layer.tar"]}], "manifest.json")
    place = cast(Workplace, type("Place", (), {"budget": Budget(LIMITS)}))
    try:
        image = read_image(store, place, rng.choice(("", "", "a:b")))
    except VmkitError:
        return False
    assert len(image.layers) == len(image.config.diff_ids) <= LIMITS.layers
    assert all(isinstance(word, str) for word in (*image.config.settings.env, *image.config.settings.cmd))
    return True


def run_source(rng: random.Random) -> bool:
    try:
        recognise(rng.randbytes(rng.randrange(600)), "file")
    except VmkitError:
        return False
    return True


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it gave a root. Raises whatever a case may not."""
    return rng.choice((run_tar, run_tar, run_disk, run_qcow2, run_documents, run_source))(rng)


if __name__ == "__main__":
    run_program(__doc__, "roots", "roots", run_seeded)
