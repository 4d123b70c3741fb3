"""Which keyrings and lock files of recipes the user trusts, remembered by their SHA-256.

While an image is built, programs out of its packages run on this host: busybox, Python, and every package's scripts
where Debian is installed. The packages of Debian's own keyring are trusted as the host's are. A recipe that names a
keyring, or a lock file with hashes of its own, lets another party vouch for them, and the user is asked first.
"""

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError, HostError, TrustError
from vmkit.image.debian.lockfile import MAX_LOCK_BYTES
from vmkit.image.debian.origin import find_keyring
from vmkit.image.recipe import resources
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.recipe.hostfile import HostFileError, read_host_file
from vmkit.state import find_state_folder

# No machine's name begins with a dot: the others in the state folder are machines' logs.
TRUSTED = ".trusted"
# Debian's keyring has 60 KB.
_KEYRING_LIMIT_BYTES = 16 << 20
# A line has 100 bytes or so.
_TRUSTED_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Voucher:
    """A file that vouches for packages: what it is, where, and its SHA-256."""

    kind: str
    path: Path
    sha256: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.path} (SHA-256 {self.sha256})"


def require_trust(spec: ImageSpec, lock_file: Path | None) -> None:
    """Raises TrustError naming each file that vouches for packages of this recipe and is not trusted yet.

    lock_file: the one that the build takes its packages from.
    """
    untrusted = find_untrusted(spec, lock_file)
    if untrusted:
        option = "--locked --trust" if lock_file is not None else "--trust"
        kinds = " and ".join(f"the {voucher.kind} {voucher.path}" for voucher in untrusted)
        raise TrustError(
            f"{spec.origin}: you have not trusted {kinds} yet",
            details="Programs from packages that it vouches for run on this host while the image is built.\n"
            + "\n".join(f"SHA-256 of the {voucher.kind}: {voucher.sha256}" for voucher in untrusted),
            hint=f"if you trust its author: vmkit build {option} {spec.origin}",
        )


def find_untrusted(spec: ImageSpec, lock_file: Path | None) -> list[Voucher]:
    """Returns the files that vouch for packages of this recipe and are not Debian's, vmkit's or remembered."""
    vouchers = list(_find_vouchers(spec, lock_file))
    if not vouchers:
        return []
    known = _read_trusted()
    return [voucher for voucher in vouchers if voucher.sha256 not in known]


def remember(vouchers: list[Voucher]) -> None:
    """Trusts what is listed from now on. Raises HostError where nothing can be remembered."""
    if not vouchers:
        return
    path = _find_trusted()
    day = time.strftime("%Y-%m-%d")
    lines = "".join(f"{voucher.sha256} {day} {voucher.kind} {voucher.path}\n" for voucher in vouchers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, lines.encode(errors="surrogateescape"))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="set VMKIT_STATE_DIR to your own") from error


def make_voucher(kind: str, path: Path, limit_bytes: int) -> Voucher:
    """A file's voucher. Raises ConfigError when it cannot be read."""
    try:
        content = read_host_file(path, limit_bytes)
    except HostFileError as error:
        raise ConfigError(f"cannot read the {kind} {path}: {error}") from error
    return Voucher(kind, path, hashlib.sha256(content).hexdigest())


def make_lock_voucher(path: Path) -> Voucher:
    """A lock file's voucher. Raises ConfigError when it cannot be read."""
    return make_voucher("lock file", path, MAX_LOCK_BYTES)


def _find_vouchers(spec: ImageSpec, lock_file: Path | None) -> Iterator[Voucher]:
    if spec.keyring is not None:
        voucher = make_voucher("keyring", spec.keyring, _KEYRING_LIMIT_BYTES)
        if not _is_debians(voucher):
            yield voucher
    # A lock file that does not exist vouches for nothing; the build refuses it.
    if (
        lock_file is not None
        and lock_file.exists()
        and not lock_file.resolve().is_relative_to(resources.find_images_dir().resolve())
    ):
        yield make_lock_voucher(lock_file)


def _is_debians(voucher: Voucher) -> bool:
    try:
        return make_voucher("keyring", find_keyring(), _KEYRING_LIMIT_BYTES).sha256 == voucher.sha256
    except HostError:
        return False


def _find_trusted() -> Path:
    folder = find_state_folder()
    if folder is None:
        raise HostError(
            "there is no home directory to remember trust in", hint="set VMKIT_STATE_DIR to a directory of your own"
        )
    return folder / TRUSTED


def _read_trusted() -> set[str]:
    """The remembered digests. A file that other users could have written is an error."""
    path = _find_trusted()
    try:
        status = path.lstat()
    except OSError:
        return set()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HostError(f"other users can write {path}, so vmkit does not trust it", hint=f"look at it: rm {path}")
    try:
        lines = read_host_file(path, _TRUSTED_LIMIT_BYTES).decode(errors="replace").splitlines()
    except HostFileError as error:
        raise HostError(f"cannot read {path}: {error}") from error
    return {line.split(" ", 1)[0] for line in lines}
