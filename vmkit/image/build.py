"""Builds images: looks a plan's digest up in the cache, and on a miss runs the plan and puts the result there.

A hit reads the recipe, the templates and vshd's sources, and nothing else: no apt, no Jinja2, no other program. Package
versions are those of the last resolve until refresh=True asks for new ones.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vmkit.architectures import HOST
from vmkit.errors import BuildError, ConfigError, HostError
from vmkit.image.artifacts import are_whole, describe_artifacts
from vmkit.image.cache import Cache, find_cache_dir, open_cache
from vmkit.image.debian.apt import UnknownPackageError
from vmkit.image.debian.lockfile import (
    compare_locks,
    fetch_locked,
    read_lock_file,
    render_lock_file,
    write_lock_file,
)
from vmkit.image.debian.packages import (
    Lock,
    Progress,
    Request,
    fetch,
    keep_lock,
    make_request,
    read_lock,
    resolve,
)
from vmkit.image.plan import Plan, make_plan
from vmkit.image.recipe.config import ImageSpec, find_mention, load_image
from vmkit.image.recipe.inputs import Inputs, Prebuilt, find_outsiders, read_inputs

if TYPE_CHECKING:
    from vmkit.image.assemble import Assembled
    from vmkit.image.travel import ImageFile

log = logging.getLogger("vmkit.image")

MANIFEST_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """A finished image in the cache. cached is False when this call built it."""

    name: str
    kernel: Path
    initrd: Path
    manifest: Path
    kernel_args: tuple[str, ...]
    default_user: str
    digest: str
    cached: bool
    # The root file system; None where it is the initramfs.
    root: Path | None = None
    # Each machine gets its root as a disk of its user's.
    takes_root: bool = False
    # What the guest loads at boot, and what it can load: another kernel's are found by these names.
    modules: tuple[str, ...] = ()
    modules_available: tuple[str, ...] = ()
    architecture: str = HOST


@dataclass(frozen=True)
class Prepared:
    """The facts of a recipe that every verb of a build needs, found once.

    request: the recipe's question to the archive. images: those that are shipped in this one, prepared too. shipped:
    what these became, where this call built them.
    """

    spec: ImageSpec
    request: Request
    cache: Cache
    images: tuple["Prepared", ...]
    shipped: tuple[BuiltImage, ...] | None = None

    @cached_property
    def inputs(self) -> Inputs | None:
        """The files that go into the image. None when an image of `images` is not built, so that its digest is unknown.

        A verb that needs only the packages does not use this property, and so reads no file of the recipe.
        """
        built = self.shipped
        if built is None:
            found = [image.find_built() for image in self.images]
            built = tuple(image for image in found if image is not None)
        return _read_inputs(self.spec, self.images, built) if len(built) == len(self.images) else None

    def read_lock(self) -> Lock | None:
        """The versions of the last resolve."""
        return read_lock(self.cache, self.request)

    def read_imported_lock(self) -> Lock | None:
        """The versions in an image that was imported. Nothing is built from them."""
        path = self.cache.imported_path(self.request.key())
        if not path.exists():
            return None
        try:
            return read_lock_file(path, self.request)
        except ConfigError:
            return None

    def find_built(self) -> BuiltImage | None:
        """The image, if it is in the cache with all its files."""
        if self.inputs is None:
            return None
        # An image that was imported goes first: it was meant to be used. A build with --update forgets it.
        for lock in (self.read_imported_lock(), self.read_lock()):
            if lock is not None:
                digest = make_plan(self.spec, self.request, self.inputs, lock).digest
                built = _read_built(self.cache, self.spec, digest, cached=True)
                if built is not None:
                    return built
        return None


def prepare(image: ImageSpec | Prepared) -> Prepared:
    """Reads a recipe. The first use of `inputs` reads its files. Raises ConfigError for a wrong recipe."""
    if isinstance(image, Prepared):
        return image
    images = tuple(map(prepare, _load_prebuilt(image)))
    return Prepared(image, make_request(image), Cache(find_cache_dir()), images)


def _load_prebuilt(spec: ImageSpec) -> tuple[ImageSpec, ...]:
    images = tuple(load_image(name, spec.architecture) for name in spec.prebuilt)
    for image in images:
        if image.prebuilt:
            raise ConfigError(f"{spec.origin}: prebuilt: {image.name} ships images itself", hint="one level is enough")
    return images


def _read_inputs(spec: ImageSpec, images: Sequence[Prepared], built: Sequence[BuiltImage]) -> Inputs:
    shipped = (
        Prebuilt(done.digest, done.kernel.parent, image.cache.lock_path(image.request.key()))
        for image, done in zip(images, built, strict=True)
    )
    return read_inputs(spec, tuple(shipped))


def build_image(
    image: ImageSpec | Prepared,
    *,
    progress: Callable[[str, float | None], None] | None = None,
    refresh: bool = False,
    lock_file: Path | None = None,
    trust: bool = False,
) -> BuiltImage:
    """The image of a recipe, from the cache or built now.

    progress is called with the current step and, where it is known, the fraction done (0 to 1). refresh resolves
    package versions anew. lock_file: takes only its versions, also in later builds on this host.
    trust: trust the recipe's keyring and lock_file from now on. Raises TrustError where they vouch for packages and are
    not trusted, ConfigError for a wrong recipe, BuildError and HostError for a failed build.
    """
    tell = progress or (lambda _text, _fraction: None)
    prepared = prepare(image)
    if trust:
        from vmkit.image.trust import find_untrusted, remember  # noqa: PLC0415 - a build in the cache needs none

        remember(find_untrusted(prepared.spec, lock_file))
    if prepared.images:
        shipped = (build_image(inner, progress=progress, refresh=refresh, trust=trust) for inner in prepared.images)
        prepared = replace(prepared, shipped=tuple(shipped))
    # Read before the cache is made: a recipe that is wrong leaves nothing behind.
    inputs = prepared.inputs
    assert inputs is not None, "its images are built by now"
    with open_cache(find_cache_dir()) as cache:
        found = None if refresh or lock_file else prepared.find_built()
        if found is not None:
            return found
        _require_trust(prepared.spec, lock_file)
        for line in find_outsiders(prepared.spec):
            log.warning(line)
        with cache.locked(
            f"build-{prepared.request.key()}", lambda: tell("waiting for another build of the same packages", None)
        ):
            if refresh or lock_file is not None:
                cache.imported_path(prepared.request.key()).unlink(missing_ok=True)
            if lock_file is not None:
                _adopt_lock(prepared, lock_file, tell)
            # The program that held the lock may have built exactly this.
            found = None if refresh else prepared.find_built()
            return found or _build(prepared, inputs, tell, refresh)


def export_image(image: ImageSpec | Prepared, built: BuiltImage, out: BinaryIO) -> "ImageFile":
    """Writes a built image as one file, for hosts without an archive (vmkit.image.travel). Raises OSError."""
    from vmkit.image.travel import write_image  # noqa: PLC0415 - a build in the cache needs no tar

    prepared = prepare(image)
    locks = (prepared.read_imported_lock(), prepared.read_lock())
    assert prepared.inputs is not None, "it is built"
    for lock in locks:
        if (
            lock is not None
            and make_plan(prepared.spec, prepared.request, prepared.inputs, lock).digest == built.digest
        ):
            data = render_lock_file(prepared.request, lock)
            folder, key = built.manifest.parent, prepared.request.key()
            return write_image(out, folder, data, key, built.name, built.architecture)
    raise BuildError(f"the image {built.name} was built anew while it was exported", hint="export it again")


def fetch_packages(image: ImageSpec | Prepared, progress: Progress, lock_file: Path | None = None) -> None:
    """Puts the packages of a recipe into the cache and builds nothing. A later build then needs no network.

    Raises the errors of build_image.
    """
    prepared = prepare(image)
    _require_trust(prepared.spec, lock_file)
    with open_cache(find_cache_dir()) as cache, cache.locked(f"build-{prepared.request.key()}"):
        if lock_file is not None:
            _adopt_lock(prepared, lock_file, progress)
        lock = prepared.read_lock() or _resolve(prepared, progress)
        fetch(cache, prepared.request, lock, progress)


def _require_trust(spec: ImageSpec, lock_file: Path | None) -> None:
    from vmkit.image.trust import require_trust  # noqa: PLC0415 - a build in the cache needs none

    require_trust(spec, lock_file)


def _adopt_lock(prepared: Prepared, lock_file: Path, tell: Progress) -> None:
    """Makes a lock file's versions this host's. Fetches its packages first, so that a failure changes nothing."""
    lock = read_lock_file(lock_file, prepared.request)
    fetch_locked(prepared.cache, prepared.request, lock, tell)
    keep_lock(prepared.cache, prepared.request, lock)


def update_lock_file(image: ImageSpec | Prepared, path: Path) -> list[str]:
    """Writes the versions of the last build as the recipe's lock file. Returns a line for each change."""
    prepared = prepare(image)
    lock = _require_lock(prepared)
    try:
        lines = compare_locks(read_lock_file(path), lock)
    except ConfigError:
        lines = [f"{path} is new: {len(lock.records)} packages"]
    write_lock_file(path, prepared.request, lock)
    from vmkit.image.trust import make_lock_voucher, remember  # noqa: PLC0415 - a build in the cache needs none

    with suppress(HostError):
        # This host made the file, so it trusts it. Without a folder to remember that in, --locked asks the user.
        remember([make_lock_voucher(path)])
    return lines


def find_drift(image: ImageSpec | Prepared, path: Path) -> list[str]:
    """Returns a line for each version of the last build that differs from the lock file."""
    return compare_locks(read_lock_file(path), _require_lock(prepare(image)))


def _require_lock(prepared: Prepared) -> Lock:
    lock = prepared.read_lock()
    if lock is None:
        raise BuildError("vmkit has not resolved the recipe's packages yet", hint="build it first: vmkit build")
    return lock


def plan_image(image: ImageSpec | Prepared) -> Plan:
    """Returns the steps of build_image without doing them. `plan_image(spec).render()` prints them for a person."""
    prepared = prepare(image)
    # The digest covers the digests of the shipped images. Without those it is unknown.
    lock = None if prepared.inputs is None else prepared.read_lock()
    return make_plan(prepared.spec, prepared.request, prepared.inputs or read_inputs(prepared.spec), lock)


def find_built_image(image: ImageSpec | Prepared) -> BuiltImage | None:
    """Returns the image of a recipe if it is in the cache. Builds and fetches nothing."""
    return prepare(image).find_built()


def _read_built(cache: Cache, spec: ImageSpec, digest: str, *, cached: bool) -> BuiltImage | None:
    """Returns the image in the cache if all its files are there and match its manifest."""
    folder = cache.image_dir(digest)
    try:
        artifacts = json.loads((folder / "manifest.json").read_bytes())["artifacts"]
        if not are_whole(folder, artifacts, cache.note_path(digest)):
            return None
        if cached:
            _note_use(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return BuiltImage(
        name=spec.name,
        kernel=folder / "kernel",
        initrd=folder / "initrd",
        manifest=folder / "manifest.json",
        kernel_args=spec.kernel_args,
        default_user=spec.default_user,
        digest=digest,
        cached=cached,
        root=folder / "root" if "root" in artifacts else None,
        takes_root=spec.root == "given",
        modules=spec.modules,
        modules_available=spec.modules_available,
        architecture=spec.architecture,
    )


def _note_use(folder: Path) -> None:
    """Records in the folder's time that the image is in use; Cache.sweep goes by it. A read-only cache, such as that of
    a container with a read-only root, is not swept through this mount."""
    try:
        os.utime(folder)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def _build(prepared: Prepared, inputs: Inputs, tell: Progress, refresh: bool) -> BuiltImage:
    spec, cache = prepared.spec, prepared.cache
    cache.sweep()
    lock = None if refresh else prepared.read_lock()
    if lock is None:
        lock = _resolve(prepared, tell)
    plan = make_plan(spec, prepared.request, inputs, lock)
    built = _read_built(cache, spec, plan.digest, cached=True)
    if built is not None:
        return built
    debs = fetch(cache, prepared.request, lock, tell)
    with cache.temporary_dir() as folder:
        _write_image(spec, plan, inputs, debs, folder, tell)
        final = cache.image_dir(plan.digest)
        if final.exists():
            # A folder here is not whole: _read_built would have returned it.
            tell(f"the image {spec.name} was damaged in the cache, and is replaced", None)
            cache.discard(final)
        cache.adopt(folder / "image", final)
    built = _read_built(cache, spec, plan.digest, cached=False)
    if built is None:
        raise BuildError(f"the image {spec.name} vanished from the cache while it was built")
    return built


def _resolve(prepared: Prepared, tell: Progress) -> Lock:
    try:
        return resolve(prepared.cache, prepared.request, tell)
    except UnknownPackageError as error:
        raise ConfigError(
            f"{find_mention(prepared.spec, error.package)}: {error.brief}",
            hint="search for it: https://packages.debian.org",
        ) from error


def _write_image(
    spec: ImageSpec, plan: Plan, inputs: Inputs, debs: dict[str, Path], folder: Path, tell: Progress
) -> None:
    """Assembles and writes `folder`/image. Imported here: a cache hit needs neither Jinja2 nor the rest."""
    from vmkit.image.assemble import assemble  # noqa: PLC0415
    from vmkit.image.formats.cpio import render_cpio  # noqa: PLC0415
    from vmkit.image.formats.ext4 import write_ext4  # noqa: PLC0415
    from vmkit.image.formats.packing import pack  # noqa: PLC0415

    work = folder / "work"
    work.mkdir()
    done = iter(range(len(plan.steps) + 1))
    assembled = assemble(spec, plan, inputs, debs, work, lambda text: tell(text, next(done) / len(plan.steps)))
    image = folder / "image"
    image.mkdir()
    (image / "kernel").write_bytes(assembled.kernel.image)
    (image / "initrd").write_bytes(pack(render_cpio(assembled.initramfs), spec.compression))
    if assembled.root is not None:
        contents = folder / "contents"
        contents.mkdir()
        write_ext4(assembled.root, image / "root", contents, plan.digest)
    manifest = _render_manifest(spec, plan, assembled, describe_artifacts(image))
    (image / "manifest.json").write_text(manifest)
    tell(f"built the image {spec.name}", 1.0)


def _render_manifest(
    spec: ImageSpec, plan: Plan, assembled: "Assembled", artifacts: dict[str, dict[str, object]]
) -> str:
    assert plan.lock is not None
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": spec.name,
        "digest": plan.digest,
        "architecture": spec.architecture,
        "suite": plan.lock.suite,
        "kernel_version": assembled.kernel.version,
        "wall": {**asdict(spec.wall), "kernel_trouble": assembled.wall_trouble},
        "kernel_args": spec.kernel_args,
        "default_user": spec.default_user,
        "python": plan.lock.python,
        "artifacts": artifacts,
        "packages": [
            {
                "name": record.name,
                "version": record.version,
                "architecture": record.architecture,
                "sha256": record.sha256,
                "suite": plan.lock.suite_of(record),
            }
            for record in plan.lock.records
        ],
    }
    return json.dumps(manifest, indent=2) + "\n"
