"""A recipe's lock as a file beside it: every package with version and hash, to be committed and built from again.

The lock in the cache is one host's memory of the last resolve; this one is for everybody. Knows nothing of building.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from vmkit.architectures import HOST
from vmkit.errors import BuildError, ConfigError
from vmkit.image.cache import Cache, write_atomically
from vmkit.image.debian.apt import PackageRecord
from vmkit.image.debian.packages import (
    Lock,
    Request,
    find_archive,
    hash_file,
    is_cached,
    name_record,
    touch_packages,
)
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.recipe.hostfile import HostFileError, read_host_file

SCHEMA = 1
# A Debian of several hundred packages takes 200 KB.
MAX_LOCK_BYTES = 16 << 20
SNAPSHOT_VARIABLE = "VMKIT_SNAPSHOT"
# Debian Policy 5.6.1 and 5.6.12; a suite's name as recipes have it; Python's version, or nothing.
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:~-]*")
_SUITE = re.compile(r"[a-z][a-z0-9./_-]*")
_PYTHON = re.compile(r"(3\.[0-9]+)?")
_RENEW = "renew it: vmkit build --update-lock"


def find_lock_path(spec: ImageSpec) -> Path:
    """`NAME.lock` beside `NAME.toml`; for another architecture than the host's, `NAME.ARCHITECTURE.lock`."""
    return spec.origin.with_suffix(".lock" if spec.architecture == HOST else f".{spec.architecture}.lock")


def write_lock_file(path: Path, request: Request, lock: Lock) -> None:
    """Writes the lock, so that a change of one package is a change of a few lines."""
    write_atomically(path, render_lock_file(request, lock))


def render_lock_file(request: Request, lock: Lock) -> bytes:
    """Returns the content of a lock file."""
    document = {"schema": SCHEMA, "request": request.key(), **asdict(lock)}
    if not lock.twins:
        del document["twins"]
    return (json.dumps(document, indent=1) + "\n").encode()


def read_lock_file(path: Path, request: Request | None = None) -> Lock:
    """The lock in a file. Raises ConfigError when there is none, when it is damaged, or is not that of `request`."""
    if not path.exists():
        raise ConfigError(f"there is no lock file {path}", hint="make one: vmkit build --update-lock")
    try:
        data = read_host_file(path, MAX_LOCK_BYTES)
    except HostFileError as error:
        raise ConfigError(f"cannot read the lock {path}: {error}", hint=_RENEW) from error
    try:
        raw = json.loads(data)
        if raw["schema"] != SCHEMA:
            raise ConfigError(f"{path} is a lock of another version of vmkit (schema {raw['schema']})", hint=_RENEW)
        asked, lock = raw["request"], _parse_lock(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the lock {path} is damaged: {error!r}", hint=_RENEW) from error
    if request is not None and asked != request.key():
        raise ConfigError(f"the recipe asks for other packages than its lock {path} has", hint=_RENEW)
    return lock


def _parse_lock(raw: Mapping[str, object]) -> Lock:
    """Raises ValueError, KeyError or TypeError."""
    records, twins = _parse_records(raw["records"]), _parse_records(raw.get("twins", []))
    # They become parts of paths and words of commands.
    for record in (*records, *twins):
        for value, pattern in ((record.name, _NAME), (record.version, _VERSION), (record.architecture, _NAME)):
            _check(value, pattern)
        if not re.fullmatch(r"[0-9a-f]{64}", record.sha256) or not isinstance(record.size_bytes, int):
            raise ValueError(f"{record.name}: no hash, or no size")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._~%/-]*", record.pool_path) or ".." in record.pool_path:
            raise ValueError(f"{record.name}: '{record.pool_path}' is no path below a mirror")
    texts = [
        _check(raw[key], pattern)
        for key, pattern in (("suite", _SUITE), ("kernel", _NAME), ("kernel_suite", _SUITE), ("python", _PYTHON))
    ]
    closure = raw["closure"]
    if not isinstance(closure, list):
        raise ValueError("closure must be a list")
    names = tuple(_check(name, _NAME) for name in closure)
    return Lock(texts[0], texts[1], texts[2], texts[3], names, records, twins)


def _parse_records(given: object) -> tuple[PackageRecord, ...]:
    """Raises ValueError, TypeError."""
    if not isinstance(given, list):
        raise ValueError("records must be a list")
    return tuple(PackageRecord(**record) for record in given)


def _check(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r} cannot be there")
    return value


def compare_locks(old: Lock, new: Lock) -> list[str]:
    """A line for each package that is another in `new`, sorted by name; empty when they are the same."""
    before, after = (
        {name_record(lock, record): record for record in (*lock.records, *lock.twins)} for lock in (old, new)
    )
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was is None:
            lines.append(f"{name}: new, {now.version if now else ''}")
        elif now is None:
            lines.append(f"{name}: gone, was {was.version}")
        elif was.sha256 != now.sha256:
            same = f"{was.version}, built anew" if was.version == now.version else f"{was.version} -> {now.version}"
            lines.append(f"{name}: {same}")
    return lines


def fetch_locked(cache: Cache, request: Request, lock: Lock, tell: Callable[[str, float | None], None]) -> None:
    """Puts exactly the lock's packages into the cache: from the archive's pool, else from $VMKIT_SNAPSHOT.

    No index is asked, for a newer one does not name what an older lock does; the hashes are the lock's. Raises
    BuildError naming every package that is nowhere to be had.
    """
    missing = [record for record in (*lock.records, *lock.twins) if not is_cached(cache, record)]
    touch_packages(cache, lock)
    if not missing:
        return
    tell(f"fetching {len(missing)} packages, {sum(record.size_bytes for record in missing) / 1e6:.0f} MB", None)
    mirrors = [request.host_mirror, *filter(None, [find_snapshot()])]
    gone = []
    with cache.temporary_dir() as folder:
        for done, record in enumerate(missing):
            tell(f"fetching {record.name}", done / len(missing))
            path = folder / f"{record.sha256}.deb"
            for mirror in mirrors:
                with cache.open_apt(replace(find_archive(request, lock, record), mirror=mirror)) as apt:
                    if apt.download_from_pool(record, path) and hash_file(path) == record.sha256:
                        cache.adopt(path, cache.package_path(record.sha256))
                        os.utime(cache.package_path(record.sha256))
                        break
            else:
                gone.append(record)
    if gone:
        raise _explain_gone(gone, mirrors)


def find_snapshot() -> str:
    """$VMKIT_SNAPSHOT: an archive as it was at a date. Raises ConfigError for what is no URL."""
    named = os.environ.get(SNAPSHOT_VARIABLE, "")
    if named and not re.match(r"(https?|file):/", named):
        raise ConfigError(f"{SNAPSHOT_VARIABLE}='{named}' is not an http, https or file URL")
    return named.rstrip("/")


def _explain_gone(gone: list[PackageRecord], mirrors: list[str]) -> BuildError:
    names = "\n".join(f"{record.name} {record.version}" for record in gone)
    snapshot = f"{SNAPSHOT_VARIABLE}=http://snapshot.debian.org/archive/debian/DATE"
    return BuildError(
        f"{len(gone)} packages of the lock are gone from {' and '.join(mirrors)}",
        details=names,
        hint=f"name an archive that still has them ({snapshot}), or {_RENEW.replace('renew it', 'renew the lock')}",
    )
