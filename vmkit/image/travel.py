"""An image as one file, for hosts that have no archive of packages: a tar whose members are checked as they come.

    vmkit-image.json   what image it is, and the SHA-256 of the next two; its own SHA-256 stands for the whole
    lock.json          the packages, as a lock file has them: the image's digest on the other host comes from these
    manifest.json      the SHA-256 and the size of each artifact
    initrd, kernel, root

The importing host takes the image and runs nothing of it but as a guest. It builds nothing from the lock: packages that
another party names would run here during a build.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vmkit.architectures import ARCHITECTURES
from vmkit.errors import ConfigError, HostError
from vmkit.image.artifacts import are_whole
from vmkit.image.cache import Cache, write_atomically
from vmkit.image.debian.lockfile import MAX_LOCK_BYTES

SCHEMA = 1
HEAD, LOCK, MANIFEST = "vmkit-image.json", "lock.json", "manifest.json"
ARTIFACTS = ("initrd", "kernel", "root")
MAX_HEAD_BYTES = 64 << 10
MAX_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
# What an import leaves to others on the disk.
SPARE_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REQUEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """What an exported file is. request: of the recipe to its archive. sha256: of all that is in the file."""

    name: str
    digest: str
    architecture: str
    request: str
    sha256: str


def write_image(out: BinaryIO, folder: Path, lock: bytes, request: str, name: str, architecture: str) -> ImageFile:
    """Writes the image in `folder`, of the cache. lock: as render_lock_file gives it. Raises OSError."""
    manifest = (folder / MANIFEST).read_bytes()
    digest = json.loads(manifest)["digest"]
    head = {
        "schema": SCHEMA,
        "name": name,
        "digest": digest,
        "architecture": architecture,
        "request": request,
        "files": {LOCK: hashlib.sha256(lock).hexdigest(), MANIFEST: hashlib.sha256(manifest).hexdigest()},
    }
    data = json.dumps(head, indent=1).encode() + b"\n"
    for inner, content in ((HEAD, data), (LOCK, lock), (MANIFEST, manifest)):
        _write_head(out, inner, len(content))
        out.write(content)
        _pad(out, len(content))
    for inner in sorted(json.loads(manifest)["artifacts"]):
        size = (folder / inner).stat().st_size
        _write_head(out, inner, size)
        with (folder / inner).open("rb") as source:
            while piece := source.read(_PIECE_BYTES):
                out.write(piece)
        _pad(out, size)
    # The end of a tar: two empty blocks.
    out.write(bytes(2 * tarfile.BLOCKSIZE))
    out.flush()
    return ImageFile(name, digest, architecture, request, hashlib.sha256(data).hexdigest())


def _write_head(out: BinaryIO, name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    out.write(member.tobuf(tarfile.GNU_FORMAT))


def _pad(out: BinaryIO, size: int) -> None:
    out.write(bytes(-size % tarfile.BLOCKSIZE))


def import_image(source: BinaryIO, place: str, cache: Cache, sha256: str | None = None) -> ImageFile:
    """Puts an exported image into the cache, unless it is there. place: of the file, for errors.

    sha256: what the file must be. Raises ConfigError for another file, and for one that is damaged: then nothing of it
    is in the cache.
    """
    reader = _Reader(source, place)
    head = reader.read_small(HEAD, MAX_HEAD_BYTES)
    found = hashlib.sha256(head).hexdigest()
    if sha256 is not None and sha256 != found:
        raise ConfigError(f"{place} is another image than you asked for", details=f"asked: {sha256}\nfound: {found}")
    try:
        image, files = _parse_head(json.loads(head), found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise reader.explain(f"its head is damaged: {error!r}") from error
    lock = reader.read_small(LOCK, MAX_LOCK_BYTES, files[LOCK])
    manifest = reader.read_small(MANIFEST, MAX_MANIFEST_BYTES, files[MANIFEST])
    artifacts = _parse_manifest(manifest, image, reader)
    with cache.temporary_dir() as folder:
        new = folder / "image"
        new.mkdir()
        _check_room(new, artifacts)
        for name in sorted(artifacts):
            reader.copy(name, new / name, artifacts[name])
        (new / MANIFEST).write_bytes(manifest)
        with cache.locked(f"build-{image.request}"):
            final = cache.image_dir(image.digest)
            if final.exists() and not _is_whole(final, artifacts, cache, image.digest):
                cache.discard(final)
            if not final.exists():
                cache.adopt(new, final)
            write_atomically(cache.imported_path(image.request), lock)
    return image


def _parse_head(head: Mapping[str, Any], sha256: str) -> tuple[ImageFile, Mapping[str, str]]:
    if head["schema"] != SCHEMA:
        raise ValueError(f"it is of form {head['schema']}, and this vmkit reads form {SCHEMA}")
    # They become names of files.
    if not _DIGEST.fullmatch(head["digest"]) or not _REQUEST.fullmatch(head["request"]):
        raise ValueError("it has no digest")
    if head["architecture"] not in ARCHITECTURES:
        raise ValueError(f"the architecture {head['architecture']!r} is unknown")
    image = ImageFile(str(head["name"]), head["digest"], head["architecture"], head["request"], sha256)
    return image, {name: str(head["files"][name]) for name in (LOCK, MANIFEST)}


def _parse_manifest(data: bytes, image: ImageFile, reader: "_Reader") -> dict[str, Mapping[str, Any]]:
    try:
        manifest = json.loads(data)
        artifacts = dict(manifest["artifacts"])
        if manifest["digest"] != image.digest or not {"initrd", "kernel"} <= set(artifacts) <= set(ARTIFACTS):
            raise ValueError("it is of another image")
        for entry in artifacts.values():
            if (
                not _DIGEST.fullmatch(entry["sha256"])
                or not isinstance(entry["size_bytes"], int)
                or entry["size_bytes"] < 0
            ):
                raise ValueError("an artifact has no hash or no size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise reader.explain(f"its manifest is damaged: {error!r}") from error
    return artifacts


def _check_room(folder: Path, artifacts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises HostError before anything is written. A file without a hash that the user gave may name any size."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    needed = sum(entry["size_bytes"] for entry in artifacts.values()) + SPARE_BYTES
    if free < needed:
        raise HostError(
            f"the image needs {needed >> 20} MiB, and the disk of the cache has {free >> 20} MiB free",
            hint="vmkit prune; or name another folder: VMKIT_CACHE_DIR=DIR",
        )


def _is_whole(folder: Path, artifacts: Mapping[str, Any], cache: Cache, digest: str) -> bool:
    try:
        return are_whole(folder, artifacts, cache.note_path(digest))
    except OSError:
        return False


class _Reader:
    """Reads the members in their order. One that is not expected, or has another hash, ends the reading."""

    def __init__(self, source: BinaryIO, place: str) -> None:
        self._source = source
        self._place = place

    def explain(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._place} is no image that vmkit exported, or it is damaged", details=why, hint="export it again"
        )

    def read_small(self, name: str, limit: int, sha256: str | None = None) -> bytes:
        size = self._read_head(name)
        if size > limit:
            raise self.explain(f"{name} has {size} bytes, more than {limit}")
        data = b"".join(self._read_pieces(name, size))
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise self.explain(f"{name} has another hash than {HEAD} says")
        return data

    def copy(self, name: str, path: Path, entry: Mapping[str, Any]) -> None:
        size = self._read_head(name)
        if size != entry["size_bytes"]:
            raise self.explain(f"{name} has {size} bytes, and its manifest has {entry['size_bytes']}")
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in self._read_pieces(name, size):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise self.explain(f"{name} has another hash than its manifest has")

    def _read_head(self, name: str) -> int:
        block = self._source.read(tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise self.explain(f"there is no {name}: {error}") from error
        if member.name != name or member.type != tarfile.REGTYPE or member.size < 0:
            raise self.explain(f"{member.name!r} is in the place of {name}")
        return member.size

    def _read_pieces(self, name: str, size: int) -> Iterator[bytes]:
        left = size
        while left:
            piece = self._source.read(min(left, _PIECE_BYTES))
            if not piece:
                raise self.explain(f"it ends inside {name}")
            left -= len(piece)
            yield piece
        self._source.read(-size % tarfile.BLOCKSIZE)
