"""From the SOURCE that a user names to a disk with a file system, and what the source says of the program in it.

A disk is used where it is. Anything else becomes an ext4 in the cache, once: the key covers what goes into it. A root
under its final name is whole, and one process packs it while others wait.
"""

import hashlib
import json
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmkit.errors import BuildError, ConfigError
from vmkit.image.artifacts import are_whole, describe_artifacts
from vmkit.image.cache import Cache, find_cache_dir, open_cache, write_atomically
from vmkit.image.formats.ext4 import write_ext4
from vmkit.image.formats.tree import Tree, directory_node
from vmkit.roots.disk import choose_root
from vmkit.roots.extents import CHUNK_BYTES, Extent, HostFile, explain_unreadable
from vmkit.roots.fetch import copy_from_registry, has_skopeo, read_registry_config, save_from_engine
from vmkit.roots.folder import list_folder, make_tree, require_same
from vmkit.roots.images import ContainerImage, explain_digest, read_image
from vmkit.roots.layers import add_archive, add_layer
from vmkit.roots.limits import Budget, RootLimits
from vmkit.roots.members import read_members
from vmkit.roots.partitions import Partition
from vmkit.roots.programs import check_architecture
from vmkit.roots.qcow2 import Qcow2Disk, read_header, require_named
from vmkit.roots.settings import ContainerSettings, ImageConfig
from vmkit.roots.source import HEAD_BYTES, PACKED, RootSource, Shape, SourceKind, parse_source, recognise
from vmkit.roots.stores import IMAGE_TOPS, ArchiveStore, FolderStore, ImageStore
from vmkit.roots.superblocks import FileSystemKind, Reader
from vmkit.roots.unpack import find_shape, hash_extent, unpack
from vmkit.roots.workplace import Workplace, open_workplace

# How long a signal may wait for its handler, while a stream sends nothing.
SIGNAL_PERIOD_MS = 500
# Part of every key: packing otherwise is another root.
_FORMAT = 1
_SCHEMA = 1
# A chain of qcow2 files, each on top of the next.
_CHAIN_LIMIT = 16
_NO_SETTINGS = ContainerSettings()
_NO_PARTITION = "leave --partition out: it chooses in a disk"

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class PreparedRoot:
    """A disk that holds a root, and how to find the root in it.

    path: in the cache, or the user's own disk. disk_format: `raw` or `qcow2`. partition: None where the disk is one
    file system. sector_bytes: of the disk; with others Linux finds no partition of it. others: the files that a qcow2
    reads and the user has named: QEMU must be given exactly these. key: of the cache; empty for a disk. notes: what a
    person should read.
    """

    path: Path
    disk_format: str
    file_system: FileSystemKind
    partition: Partition | None = None
    sector_bytes: int = 512
    others: tuple[Path, ...] = ()
    settings: ContainerSettings = _NO_SETTINGS
    key: str = ""
    cached: bool = False
    notes: tuple[str, ...] = ()


def prepare_root(
    source: str | RootSource,
    *,
    partition: int | None = None,
    named: tuple[Path, ...] = (),
    architecture: str = "amd64",
    stdin: int = 0,
    limits: RootLimits | None = None,
    progress: Progress | None = None,
    is_writable: bool = False,
) -> PreparedRoot:
    """Finds or makes the disk of a root.

    partition: the number of the root's partition in a disk. named: files that a qcow2 may read besides itself. stdin:
    the descriptor that `-` reads. is_writable: a guest will write on top of it. What is packed has a journal then, and
    room for files; a disk may have a journal to replay.

    Raises ConfigError for a source that cannot be a root, BuildError for one that is damaged, unsafe or too large,
    HostError for what this host lacks.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    if parsed.kind is SourceKind.IMAGE:
        raise ConfigError(f"'{parsed.text}' is the name of an image", hint="a path has a slash: ./NAME")
    status = None if parsed.path is None else _stat(parsed.path)
    if status is not None and parsed.kind is SourceKind.PATH and not stat.S_ISDIR(status.st_mode):
        disk = _find_disk(parsed, status, partition, named, is_writable=is_writable)
        if disk is not None:
            return disk
    if partition is not None:
        raise ConfigError(f"{parsed.text} has no partitions", hint=_NO_PARTITION)
    with open_cache(find_cache_dir()) as cache, cache.temporary_dir() as folder:
        work = folder / "work"
        work.mkdir()
        with open_workplace(work, limits or RootLimits()) as place:
            tell = progress or (lambda _text, _fraction: None)
            packer = _Packer(cache, place, architecture, tell, is_writable=is_writable)
            return packer.pack(parsed, status, stdin)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise explain_unreadable(path, error) from error


# Disks


def _find_disk(
    source: RootSource, status: os.stat_result, partition: int | None, named: tuple[Path, ...], *, is_writable: bool
) -> PreparedRoot | None:
    """The disk at the source's path; None where it is an archive, or a pipe that may carry one."""
    path = source.path
    assert path is not None
    if stat.S_ISFIFO(status.st_mode):
        return None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise ConfigError(f"{path} is no file, folder or disk", hint="give the path of a root file system")
    with HostFile(path) as file:
        shape = recognise(file.read(0, HEAD_BYTES), str(path))
        if shape is Shape.DISK:
            return _describe_disk(path, "raw", file.read, file.size_bytes, partition, is_writable=is_writable)
        if shape is not Shape.QCOW2:
            return None
        with _open_qcow2(path, file, named, _CHAIN_LIMIT) as (disk, others):
            found = _describe_disk(path, "qcow2", disk.read, disk.size_bytes, partition, is_writable=is_writable)
            return replace(found, others=others)


def _describe_disk(
    path: Path, disk_format: str, read: Reader, size: int, number: int | None, *, is_writable: bool
) -> PreparedRoot:
    found = choose_root(read, size, str(path), number)
    if found.file_system.trouble and not is_writable:
        raise ConfigError(
            f"a guest cannot mount the {found.file_system.kind} of {path} read-only: {found.file_system.trouble}",
            hint="repair it first, for example with e2fsck",
        )
    sector = found.table.sector_bytes if found.table else 512
    return PreparedRoot(
        path.absolute(), disk_format, found.file_system.kind, found.partition, sector, notes=found.notes
    )


@contextmanager
def _open_qcow2(
    path: Path, file: HostFile, named: tuple[Path, ...], depth: int
) -> Iterator[tuple[Qcow2Disk, tuple[Path, ...]]]:
    """The guest's view of a qcow2, and the other files that it reads, all of which the user has named."""
    header = read_header(file.read)
    others = require_named(header, path, named)
    backing = others[0] if header.backing else None
    data = others[-1] if header.data else None
    if not depth:
        raise BuildError(f"{path} is at the end of a chain of more than {_CHAIN_LIMIT} qcow2 files")
    with _open_reader(data) as data_reader, _open_backing(backing, named, depth) as (backing_reader, more):
        yield Qcow2Disk(header, file.read, backing=backing_reader, data=data_reader), (*others, *more)


@contextmanager
def _open_reader(path: Path | None) -> Iterator[Reader | None]:
    if path is None:
        yield None
        return
    with HostFile(path) as file:
        yield file.read


@contextmanager
def _open_backing(
    path: Path | None, named: tuple[Path, ...], depth: int
) -> Iterator[tuple[Reader | None, tuple[Path, ...]]]:
    if path is None:
        yield None, ()
        return
    with HostFile(path) as file:
        if recognise(file.read(0, HEAD_BYTES), str(path)) is not Shape.QCOW2:
            yield file.read, ()
            return
        with _open_qcow2(path, file, named, depth - 1) as (disk, others):
            yield disk.read, others


# What is packed


class _Packer:
    def __init__(self, cache: Cache, place: Workplace, architecture: str, tell: Progress, *, is_writable: bool) -> None:
        self._is_writable = is_writable
        self._cache = cache
        self._place = place
        self._architecture = architecture
        self._tell = tell

    def pack(self, source: RootSource, status: os.stat_result | None, stdin: int) -> PreparedRoot:
        match source.kind:
            case SourceKind.STREAM:
                return self._pack_archive(self._read_stream(stdin), "standard input", "")
            case SourceKind.REGISTRY:
                return self._pack_registry(source.reference)
            case _:
                assert source.path is not None
                assert status is not None
                return self._pack_path(source, source.path, status)

    def _pack_path(self, source: RootSource, path: Path, status: os.stat_result) -> PreparedRoot:
        if stat.S_ISFIFO(status.st_mode):
            with path.open("rb", buffering=0) as pipe:
                return self._pack_archive(self._read_stream(pipe.fileno()), str(path), source.reference)
        if not stat.S_ISDIR(status.st_mode):
            return self._pack_file(self._place.open(path), source)
        # Every layout has this file (image-layout.md), and no root has it at its top.
        if source.kind is not SourceKind.PATH or (path / "oci-layout").is_file():
            return self._pack_image(FolderStore(path, self._place), source.reference)
        return self._pack_folder(path)

    def _pack_file(self, archive: Extent, source: RootSource) -> PreparedRoot:
        """An archive on disk. While the file is the same, a note in the cache saves unpacking and hashing it again."""
        if archive.file.is_block_device:
            # It may change without a trace in its times.
            return self._pack_archive(archive, str(source.path), source.reference, source.kind)
        facts = (_FORMAT, self._architecture, source.kind.value, source.reference, archive.file.identity)
        covered = repr((*facts, "writable") if self._is_writable else facts)
        note = self._cache.source_path(hashlib.sha256(covered.encode()).hexdigest())
        known = self._read_note(note)
        if known is not None:
            return known
        made = self._pack_archive(archive, str(source.path), source.reference, source.kind)
        self._place.require_unchanged()
        # If the note cannot be written, the next start reads the archive again.
        with suppress(OSError):
            write_atomically(note, json.dumps({"key": made.key, "settings": asdict(made.settings)}).encode())
        return made

    def _read_note(self, path: Path) -> PreparedRoot | None:
        try:
            note = json.loads(path.read_bytes())
            found = self._find(str(note["key"]))
            texts = note["settings"]
            settings = ContainerSettings(
                env=tuple(texts["env"]),
                working_dir=texts["working_dir"],
                user=texts["user"],
                entrypoint=tuple(texts["entrypoint"]),
                cmd=tuple(texts["cmd"]),
            )
            return None if found is None else replace(found, settings=settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _read_stream(self, descriptor: int) -> Extent:
        """Copies a stream, which can be read once only and not by offset."""
        if os.isatty(descriptor):
            raise ConfigError("standard input is a terminal", hint="give an archive: docker save IMAGE | vmkit up -")
        self._tell("reading standard input", None)
        return self._place.keep(self._place.budget.limit(iter(lambda: _read_arriving(descriptor), b"")))

    def _pack_archive(
        self, archive: Extent, name: str, reference: str, kind: SourceKind = SourceKind.PATH
    ) -> PreparedRoot:
        """A tar of a root, or one of a container image: its members tell which."""
        self._tell(f"reading {name}", None)
        digest = ""
        if find_shape(archive, name) in PACKED:
            unpacked = unpack(archive, name, self._place)
            archive, digest = unpacked.archive, unpacked.digest
        shape = find_shape(archive, name)
        if shape is not Shape.TAR:
            if b"\0" not in archive.read(0, HEAD_BYTES):
                hint = "give a container image or a tar of a root, such as `docker save` writes"
                raise ConfigError(f"{name} holds text, and vmkit expects a tar", hint=hint)
            what = "a disk" if shape in (Shape.DISK, Shape.QCOW2) else "no tar"
            raise ConfigError(f"{name} holds {what}, and vmkit expects a tar", hint="unpack it, and give its path")
        if kind is not SourceKind.PATH or _is_image(archive, name):
            # Its own documents have the digests.
            return self._pack_image(ArchiveStore(archive, name), reference)

        def make() -> Tree:
            tree = Tree(merged=False)
            add_archive(tree, archive, name, self._place.budget)
            return tree

        return self._find_or_make("tar", [digest or hash_extent(archive)], name, make, self._place.require_unchanged)

    def _pack_image(self, store: ImageStore, reference: str) -> PreparedRoot:
        return self._pack_layers(read_image(store, self._place, reference, self._architecture), store.name)

    def _pack_layers(self, image: ContainerImage, name: str) -> PreparedRoot:
        def make() -> Tree:
            tree = Tree(merged=False)
            for number, layer in enumerate(image.layers):
                self._tell(f"reading {layer.name}", number / len(image.layers))
                algorithm, _, digest = layer.digest.partition(":")
                unpacked = unpack(layer.archive, layer.name, self._place, algorithm or "sha256")
                if (digest and unpacked.packed_digest != digest) or f"sha256:{unpacked.digest}" != layer.diff_id:
                    raise explain_digest(layer.name)
                add_layer(tree, unpacked.archive, layer.name, self._place.budget)
            _add_folder(tree, image.config.settings.working_dir)
            return tree

        made = self._find_or_make("layers", _list_contents(image.config), name, make, self._place.require_unchanged)
        return replace(made, settings=image.config.settings)

    def _pack_registry(self, reference: str) -> PreparedRoot:
        if not has_skopeo():
            archive = save_from_engine(reference, self._architecture, self._place, self._tell)
            return self._pack_image(ArchiveStore(archive, reference), "")
        self._tell(f"asking for {reference}", None)
        config = read_registry_config(reference, self._architecture)
        known = self._find(self._make_key("layers", _list_contents(config)))
        if known is not None:
            return replace(known, settings=config.settings)
        self._tell(f"fetching {reference}", None)
        folder = copy_from_registry(reference, self._architecture, self._place)
        return self._pack_image(FolderStore(folder, self._place), "")

    def _pack_folder(self, folder: Path) -> PreparedRoot:
        if self._cache.is_inside(folder):
            raise ConfigError(
                f"the cache folder is inside of {folder}, which changes with it",
                hint="name another cache folder: VMKIT_CACHE_DIR=DIR",
            )
        self._tell(f"listing {folder}", None)
        listing = list_folder(folder, self._place.budget)
        limits = self._place.budget.limits
        return self._find_or_make(
            "folder",
            [listing.digest()],
            str(folder),
            lambda: make_tree(listing),
            lambda: require_same(listing, Budget(limits)),
        )

    def _find_or_make(
        self, kind: str, contents: list[str], name: str, make: Callable[[], Tree], check: Callable[[], None]
    ) -> PreparedRoot:
        """The root of these contents, from the cache or packed now. check: raises where they changed meanwhile."""
        key = self._make_key(kind, contents)
        found = self._find(key)
        if found is not None:
            return found
        self._cache.sweep()
        # Lock files stay, so there are 256 of them and not one for each root.
        with self._cache.locked(
            f"root-{key[:2]}", lambda: self._tell("waiting for another program that packs a root", None)
        ):
            # The program that held the lock may have packed exactly this.
            found = self._find(key)
            if found is not None:
                return found
            self._make(key, kind, name, make(), check)
            found = self._find(key)
        if found is None:
            raise BuildError(f"the root of {name} vanished from the cache while vmkit packed it")
        return replace(found, cached=False)

    def _make_key(self, kind: str, contents: list[str]) -> str:
        covered = {"format": _FORMAT, "architecture": self._architecture, "kind": kind, "contents": contents}
        if self._is_writable:
            covered["writable"] = True
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()

    def _find(self, key: str) -> PreparedRoot | None:
        """The root in the cache, when all its files are there and are those of its manifest."""
        folder = self._cache.root_dir(key)
        try:
            artifacts = json.loads((folder / "manifest.json").read_bytes())["artifacts"]
            if "root" not in artifacts or not are_whole(folder, artifacts, self._cache.note_path(key)):
                return None
            # The folder's time records when the root was last used. Cache.sweep goes by it.
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return PreparedRoot(folder / "root", "raw", FileSystemKind.EXT4, key=key, cached=True)

    def _make(self, key: str, kind: str, name: str, tree: Tree, check: Callable[[], None]) -> None:
        if not len(tree):
            raise ConfigError(f"{name} holds no files", hint="give a root file system, with a shell or a program in it")
        check_architecture(tree, self._architecture, name)
        self._tell(f"packing {len(tree)} files of {name}", None)
        result, contents = self._place.make_folder(), self._place.make_folder()
        write_ext4(tree, result / "root", contents, key, is_writable=self._is_writable)
        check()
        manifest = {"schema": _SCHEMA, "kind": kind, "name": name, "artifacts": describe_artifacts(result)}
        (result / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        final = self._cache.root_dir(key)
        if final.exists():
            # A folder here is not whole: _find would have returned it.
            self._tell(f"the root of {name} was damaged in the cache, and is replaced", None)
            self._cache.discard(final)
        self._cache.adopt(result, final)


def _list_contents(config: ImageConfig) -> list[str]:
    """What the disk of an image depends on."""
    folder = config.settings.working_dir.strip("/")
    return [*config.diff_ids, folder] if folder else list(config.diff_ids)


def _add_folder(tree: Tree, path: str) -> None:
    """Makes the directory that commands start in, where no layer has it: engines do so when a container begins."""
    # Where a file is in the way, the command's start tells.
    with suppress(BuildError):
        if path and tree.look_up(path) is None:
            tree.put(path, directory_node())


def _is_image(archive: Extent, name: str) -> bool:
    """Whether a tar is a container image's: such a one has two documents at its top, or one and no folders but its own.

    The members of a root are not looked through: the first that no image has is the answer.
    """
    tops = set()
    for member in read_members(archive.read, name=name):
        top = member.path.split("/")[0]
        if not IMAGE_TOPS.fullmatch(top):
            return False
        tops.add(top)
    return bool(tops & {"manifest.json", "index.json"})


def _read_arriving(descriptor: int) -> bytes:
    """The next bytes of a stream; b"" at its end.

    Python runs the handler of a signal between two of its steps. One that comes just before a read has begun would
    wait for the read's end, and a stream may send nothing more.
    """
    arrivals = select.poll()
    arrivals.register(descriptor, select.POLLIN)
    while not arrivals.poll(SIGNAL_PERIOD_MS):
        pass
    return os.read(descriptor, CHUNK_BYTES)
