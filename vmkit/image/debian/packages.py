"""Which packages an image is made of: a request becomes a lock (names, versions, hashes), and a lock becomes files.

A lock is kept in the cache and used until it is renewed on purpose, so a build asks the network only when something is
missing. Knows nothing of what is done with the files.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmkit.architectures import HOST
from vmkit.errors import BuildError
from vmkit.image.cache import Cache, write_atomically
from vmkit.image.debian.apt import Apt, Archive, MissingSuiteError, PackageRecord, UntrustedError
from vmkit.image.debian.origin import choose_mirror, choose_suites, find_keyring
from vmkit.image.recipe.config import ImageSpec

# Part of every lock's key: raise it when the rules of resolving change.
LOCK_SCHEMA = 2

_KERNEL_DEPENDENCY = re.compile(r"(linux-image-[0-9][a-z0-9.+-]*)")
_PYTHON_DEPENDENCY = re.compile(r"python(3\.[0-9]+)-minimal")
# What every Debian has (debootstrap's minbase), as apt-patterns(7); and useradd, for the person's account.
_MINBASE = ("?essential", "?priority(required)", "apt", "passwd")
_CHUNK_BYTES = 1 << 20
# What Python and busybox need to run on this host, beside Python's own packages.
TWINS = ("busybox-static", "libc6", "libexpat1", "libffi8", "zlib1g")

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What a recipe asks of an archive. Equal questions share a lock.

    suite and mirror are the recipe's own words, suites and host_mirror what they mean on this host: the answer to
    "auto" is as good on another host, so those do not tell one lock from another.
    """

    suite: str
    suites: tuple[str, ...]
    mirror: str
    host_mirror: str
    components: tuple[str, ...]
    keyring: str
    kernel: str
    kernel_suite: str
    python: bool
    extract: tuple[str, ...]
    packages: tuple[str, ...]
    bootstrap: bool
    architecture: str = HOST

    def key(self) -> str:
        """A name for this request's lock, stable between runs and releases of one LOCK_SCHEMA."""
        # Requests of the host's architecture have the names that they had before there were others.
        left_out = {"suites", "host_mirror", *(("architecture",) if self.architecture == HOST else ())}
        asked = {key: value for key, value in asdict(self).items() if key not in left_out}
        text = json.dumps([LOCK_SCHEMA, asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Lock:
    """Every package of an image, with version and hash: the answer to a Request.

    kernel names one of them, the only one of kernel_suite; python is like `3.13`,
    or empty; closure names those unpacked whole, or installed. twins: packages of the host's architecture, for the
    programs that a build for another one must run (vmkit.image.twins).
    """

    suite: str
    kernel: str
    kernel_suite: str
    python: str
    closure: tuple[str, ...]
    records: tuple[PackageRecord, ...]
    twins: tuple[PackageRecord, ...] = ()

    def suite_of(self, record: PackageRecord) -> str:
        """The suite a package is from."""
        return self.kernel_suite if record.name == self.kernel else self.suite

    def find(self, name: str) -> PackageRecord:
        for record in self.records:
            if record.name == name:
                return record
        raise BuildError(f"the package lock does not hold '{name}'", hint="renew it: vmkit build --update")


def make_request(spec: ImageSpec) -> Request:
    """What the recipe asks for, with the host's choices filled in."""
    return Request(
        suite=spec.suite,
        suites=choose_suites(spec.suite),
        mirror=spec.mirror,
        host_mirror=choose_mirror(spec.mirror),
        components=spec.components,
        keyring=str(spec.keyring.absolute()) if spec.keyring else "",
        kernel=spec.kernel,
        kernel_suite=spec.kernel_suite,
        python=bool(spec.python_modules),
        extract=tuple(name for name, _ in spec.extract),
        packages=tuple(sorted(spec.packages)),
        bootstrap=spec.bootstrap,
        architecture=spec.architecture,
    )


def read_lock(cache: Cache, request: Request) -> Lock | None:
    """The lock of an earlier build, or None. One that cannot be read is as none: it will be made again."""
    try:
        raw = json.loads(cache.lock_path(request.key()).read_bytes())
        records, twins = (
            tuple(PackageRecord(**record) for record in raw[key]) if key in raw else () for key in ("records", "twins")
        )
        closure = tuple(raw["closure"])
        return Lock(raw["suite"], raw["kernel"], raw["kernel_suite"], raw["python"], closure, records, twins)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_lock(cache: Cache, request: Request, lock: Lock) -> None:
    """Makes it the request's lock, until it is renewed."""
    write_atomically(cache.lock_path(request.key()), json.dumps(asdict(lock), indent=1).encode())


def resolve(cache: Cache, request: Request, progress: Progress) -> Lock:
    """Asks the archive for the newest versions and keeps the answer as the request's lock.

    `auto` falls back to the host's suite only where the first one cannot be verified, or the mirror lacks it.
    """
    for suite in request.suites:
        archive = _archive(request, suite)
        progress(f"fetching the package index of {archive}", None)
        with cache.open_apt(archive) as apt:
            try:
                apt.update()
            except (UntrustedError, MissingSuiteError) as error:
                if suite == request.suites[-1]:
                    raise
                progress(f"{error.brief}: trying the host's own suite", None)
                continue
            progress("resolving packages", None)
            lock = _resolve(apt, request, suite)
        if request.kernel_suite not in ("", suite):
            lock = _resolve_kernel(cache, request, lock, progress)
        if request.architecture != HOST:
            lock = _resolve_twins(cache, request, lock, progress)
        keep_lock(cache, request, lock)
        return lock
    raise AssertionError("a request names at least one suite")


def fetch(cache: Cache, request: Request, lock: Lock, progress: Progress) -> dict[str, Path]:
    """Every package of the lock as a verified file, by name; what the cache has is not fetched again.

    A twin's name has its architecture behind it: `libc6:amd64`.
    """
    missing = [record for record in (*lock.records, *lock.twins) if not is_cached(cache, record)]
    if missing:
        total = sum(record.size_bytes for record in missing)
        progress(f"fetching {len(missing)} packages, {total / 1e6:.0f} MB", None)
    groups: dict[Archive, list[PackageRecord]] = {}
    for record in missing:
        groups.setdefault(find_archive(request, lock, record), []).append(record)
    for archive, records in groups.items():
        with cache.open_apt(archive) as apt, cache.temporary_dir() as folder:
            if not apt.has_index():
                apt.update()
            apt.download(records, folder)
            _keep(cache, records, folder)
    touch_packages(cache, lock)
    return {name_record(lock, record): cache.package_path(record.sha256) for record in (*lock.records, *lock.twins)}


def name_record(lock: Lock, record: PackageRecord) -> str:
    """A name that no other package of the lock has."""
    return f"{record.name}:{HOST}" if record in lock.twins else record.name


def find_archive(request: Request, lock: Lock, record: PackageRecord) -> Archive:
    """Where a package of the lock is from."""
    if record in lock.twins:
        return _archive(request, lock.suite, HOST)
    return _archive(request, lock.suite_of(record))


def _archive(request: Request, suite: str, architecture: str = "") -> Archive:
    keyring = Path(request.keyring) if request.keyring else find_keyring()
    return Archive(request.host_mirror, suite, request.components, keyring, architecture or request.architecture)


def _resolve(apt: Apt, request: Request, suite: str) -> Lock:
    """Everything of this suite; the kernel only if it is of this suite, too."""
    closure = apt.resolve((*_MINBASE, *request.packages) if request.bootstrap else request.packages)
    python, kernel = "", ""
    own_kernel = request.kernel_suite in ("", suite)
    names = [*((request.kernel,) if own_kernel else ()), *request.extract, *closure]
    found = apt.show(sorted({*names, *(("python3-minimal",) if request.python else ())}))
    wanted = {*request.extract, *closure}
    if own_kernel:
        kernel = _kernel_behind(found[request.kernel])
        wanted.add(kernel)
    if request.python:
        python = _python_behind(found["python3-minimal"])
        # An installed Debian has a Python of its own, whole.
        wanted |= set() if request.bootstrap else set(python_packages(python))
    records = apt.show(sorted(wanted))
    return Lock(suite, kernel, suite, python, closure, tuple(records[name] for name in sorted(wanted)))


def _resolve_kernel(cache: Cache, request: Request, lock: Lock, progress: Progress) -> Lock:
    """The lock with the kernel of another suite in it."""
    suite = request.kernel_suite
    archive = _archive(request, suite)
    progress(f"fetching the package index of {archive}", None)
    with cache.open_apt(archive) as apt:
        apt.update()
        kernel = _kernel_behind(apt.show([request.kernel])[request.kernel])
        record = apt.show([kernel])[kernel]
    others = [known for known in lock.records if known.name != kernel]
    records = tuple(sorted([*others, record], key=lambda known: known.name))
    return replace(lock, kernel=kernel, kernel_suite=suite, records=records)


def _resolve_twins(cache: Cache, request: Request, lock: Lock, progress: Progress) -> Lock:
    """The lock with the packages of this host's architecture whose programs the build runs."""
    archive = _archive(request, lock.suite, HOST)
    progress(f"fetching the package index of {archive}", None)
    with cache.open_apt(archive) as apt:
        apt.update()
        names = {*TWINS, *(python_packages(lock.python) if lock.python else ())}
        return replace(lock, twins=tuple(apt.show(sorted(names)).values()))


def python_packages(python: str) -> tuple[str, str, str]:
    """The packages of an interpreter: the program, the modules it cannot do without, the rest of the library."""
    return (f"python{python}-minimal", f"libpython{python}-minimal", f"libpython{python}-stdlib")


def _kernel_behind(record: PackageRecord) -> str:
    """A meta package (linux-image-cloud-amd64) depends on the kernel of the day; a kernel is itself."""
    found = _KERNEL_DEPENDENCY.search(record.depends)
    return found[1] if found else record.name


def _python_behind(record: PackageRecord) -> str:
    found = _PYTHON_DEPENDENCY.search(record.depends)
    if not found:
        raise BuildError(f"cannot tell the Python version of this suite from {record.name} {record.version}")
    return found[1]


def is_cached(cache: Cache, record: PackageRecord) -> bool:
    """Whether the cache has the package with the content that the lock names.

    It was verified on its way in, but a disk or a person may have changed it since. Only a build that is not in the
    cache asks, and a Debian takes a third of a second.
    """
    path = cache.package_path(record.sha256)
    try:
        return path.stat().st_size == record.size_bytes and hash_file(path) == record.sha256
    except OSError:
        return False


def touch_packages(cache: Cache, lock: Lock) -> None:
    """Notes that a build uses the packages now: a file's time is else that of the archive."""
    for record in (*lock.records, *lock.twins):
        with contextlib.suppress(OSError):
            os.utime(cache.package_path(record.sha256))


def _keep(cache: Cache, records: list[PackageRecord], folder: Path) -> None:
    by_hash = {hash_file(path): path for path in folder.glob("*.deb")}
    for record in records:
        path = by_hash.get(record.sha256)
        if path is None:
            raise BuildError(
                f"vmkit resolved {record.name} {record.version}, and apt fetched another package",
                details=f"no file with sha256 {record.sha256} arrived",
                hint="renew the package lock: vmkit build --update",
            )
        cache.adopt(path, cache.package_path(record.sha256))


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
