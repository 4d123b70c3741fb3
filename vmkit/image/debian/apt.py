"""apt with state, cache, sources and keyring of its own in one folder: unprivileged, signatures always checked.

The host's apt configuration is still read, for its proxies and certificates; its hooks, pins, default release, foreign
architectures and trusted keys are not used. Knows nothing of images: names go in, verified files come out.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmkit.architectures import HOST
from vmkit.errors import BuildError, CommandError, HostError
from vmkit.image.debian.origin import parse_stanza
from vmkit.run import run

# A mirror's index is 10 MB; this is a slow line's pace. apt's own per-connection timeouts are shorter and speak first.
UPDATE_TIMEOUT_S = 600.0
# 45 MB for tiny; a recipe with many packages on a slow line.
DOWNLOAD_TIMEOUT_S = 3600.0
QUERY_TIMEOUT_S = 60.0

APT_HELPER = "/usr/lib/apt/apt-helper"

_SIGNATURE_TROUBLE = re.compile(
    r"NO_PUBKEY|EXPKEYSIG|REVKEYSIG|BADSIG|is not signed|signatures? (?:couldn't|were invalid)|GPG error|sqv error"
)
_NO_RELEASE = re.compile(r"does not have a Release file|no longer has a Release file")
_INSTALL_LINE = re.compile(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", re.MULTILINE)
_UNKNOWN = re.compile(r"Unable to locate package (\S+)|Package '?([a-z0-9.+-]+)'? has no installation candidate")


class UnknownPackageError(BuildError):
    """The archive has no package of this name."""

    def __init__(self, package: str, where: str) -> None:
        super().__init__(f"there is no package '{package}' in {where}")
        self.package = package


class MissingSuiteError(BuildError):
    """The mirror answers and has no such suite."""


class UntrustedError(BuildError):
    """The archive's signature was not made by a key of the keyring, or there is none."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One suite of one mirror for one architecture, and the keyring that must have signed it."""

    mirror: str
    suite: str
    components: tuple[str, ...]
    keyring: Path
    architecture: str = field(default=HOST, repr=False)

    def __str__(self) -> str:
        architecture = "" if self.architecture == HOST else f" for {self.architecture}"
        return f"{self.suite} ({' '.join(self.components)}){architecture} at {self.mirror}"


@dataclass(frozen=True, slots=True)
class PackageRecord:
    """The signed index's entry of one package."""

    name: str
    version: str
    architecture: str
    size_bytes: int
    sha256: str
    pool_path: str
    depends: str


class Apt:
    """One archive's private apt state in `folder`; the caller sees to it that one process at a time uses it."""

    def __init__(self, folder: Path, archive: Archive) -> None:
        self._folder = folder
        self._archive = archive
        self._config = folder / "apt.conf"
        self._environ = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}

    def update(self) -> None:
        """Fetches the index. Raises UntrustedError, or BuildError when apt cannot fetch it."""
        self._write_config()
        try:
            self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update", timeout_s=UPDATE_TIMEOUT_S)
        except CommandError as error:
            raise self._update_error(error) from error

    def has_index(self) -> bool:
        return any((self._folder / "state/lists").glob("*Packages*"))

    def show(self, names: Sequence[str]) -> dict[str, PackageRecord]:
        """The newest version of each named package. Raises UnknownPackageError for the first that is not there."""
        if not names:
            return {}
        try:
            output = self._run("apt-cache", "--no-all-versions", "show", *names, timeout_s=QUERY_TIMEOUT_S)
        except CommandError:
            # All names are unknown. Where some are, apt-cache leaves them out, which is found below.
            output = b""
        records = {record.name: record for record in _parse_records(output.decode(errors="replace"))}
        for name in names:
            if name not in records:
                raise UnknownPackageError(name, str(self._archive))
        return {name: records[name] for name in names}

    def resolve(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names and everything they depend on, as apt would install them on an empty system, sorted."""
        if not names:
            return ()
        try:
            output = self._run(
                "apt-get",
                "-q",
                "-y",
                "--simulate",
                "--no-install-recommends",
                "install",
                *names,
                timeout_s=QUERY_TIMEOUT_S,
            ).decode(errors="replace")
        except CommandError as error:
            unknown = _UNKNOWN.search(error.details)
            if unknown:
                raise UnknownPackageError(unknown[1] or unknown[2], str(self._archive)) from error
            raise BuildError(f"apt cannot install {', '.join(names)} together", details=error.details) from error
        return tuple(sorted({name for name, _ in _INSTALL_LINE.findall(output)}))

    def download(self, records: Iterable[PackageRecord], folder: Path) -> None:
        """Fetches packages into a folder, as apt names them; apt checks each against the signed index."""
        words = [f"{record.name}={record.version}" for record in records]
        try:
            self._run("apt-get", "-q", "download", *words, timeout_s=DOWNLOAD_TIMEOUT_S, cwd=folder)
        except CommandError as error:
            raise BuildError(
                f"cannot fetch packages from {self._archive.mirror}",
                details=error.details,
                hint="if the mirror has moved on to newer versions: vmkit build --update",
            ) from error

    def download_from_pool(self, record: PackageRecord, path: Path) -> bool:
        """Fetches one file of the archive's pool, which no index need name any more; False when it is not there.

        Only a file of the record's hash is kept.
        """
        self._write_config()
        # apt's own method for file: URLs leaves the file where it is; copy: is its twin that brings it.
        mirror = re.sub(r"^file:", "copy:", self._archive.mirror)
        words = (f"{mirror}/{record.pool_path}", str(path), f"SHA256:{record.sha256}")
        try:
            self._run(APT_HELPER, "download-file", *words, timeout_s=DOWNLOAD_TIMEOUT_S)
        except CommandError:
            return False
        return path.is_file()

    def _run(self, program: str, *words: str, timeout_s: float, cwd: Path | None = None) -> bytes:
        if shutil.which(program) is None:
            hint = "images are made of Debian packages, which apt fetches: sudo apt-get install apt"
            raise HostError(f"cannot find the program '{program}'", hint=hint)
        # A build that is killed takes apt along: an orphan would hold apt's own locks against the next build.
        argv = ["setpriv", "--pdeathsig", "KILL", program, "-c", str(self._config), *words]
        return run(argv, timeout_s=timeout_s, env=self._environ, cwd=cwd, package="util-linux")

    def _write_config(self) -> None:
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").write_bytes(b"")
        (self._folder / "archive.sources").write_text(_render_sources(self._archive))
        self._config.write_text(_render_config(self._folder.absolute(), self._archive.architecture))

    def _update_error(self, error: CommandError) -> BuildError:
        brief = f"cannot fetch the package index of {self._archive}"
        if _SIGNATURE_TROUBLE.search(error.details) or "is not signed" in error.details:
            return UntrustedError(
                f"the package index of {self._archive} is not signed by a key of {self._archive.keyring}",
                details=error.details,
                hint="vmkit uses nothing unverified; a newer debian-archive-keyring may know the key",
            )
        if _NO_RELEASE.search(error.details):
            return MissingSuiteError(
                f"{self._archive.mirror} has no suite '{self._archive.suite}'",
                details=error.details,
                hint="the suite and mirror are the recipe's `suite` and `mirror`; VMKIT_MIRROR names another mirror",
            )
        return BuildError(
            brief,
            details=error.details,
            hint="the first build needs a Debian mirror; VMKIT_MIRROR=URL names another one",
        )


def _render_sources(archive: Archive) -> str:
    return (
        f"Types: deb\nURIs: {archive.mirror}\nSuites: {archive.suite}\nComponents: {' '.join(archive.components)}\n"
        f"Architectures: {archive.architecture}\nSigned-By: {archive.keyring.absolute()}\n"
    )


def _render_config(folder: Path, architecture: str) -> str:
    """apt.conf(5). Read after the host's own files, so what must not be theirs is cleared or set here."""
    cleared = (
        "APT::Update::Pre-Invoke",
        "APT::Update::Post-Invoke",
        "APT::Update::Post-Invoke-Success",
        "APT::Architectures",
        "DPkg",
    )
    settings = {
        "APT::Architecture": architecture,
        # Without it apt asks the host's dpkg, and looks for the packages of all that this names.
        "APT::Architectures::": architecture,
        "APT::Default-Release": "",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "APT::Get::AllowUnauthenticated": "false",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::AllowWeakRepositories": "false",
        "Acquire::AllowDowngradeToInsecureRepositories": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Dir::State": f"{folder}/state",
        "Dir::State::lists": f"{folder}/state/lists",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "Dir::Cache::archives": f"{folder}/cache/archives",
        "Dir::Cache::pkgcache": f"{folder}/cache/pkgcache.bin",
        "Dir::Cache::srcpkgcache": f"{folder}/cache/srcpkgcache.bin",
        "Dir::Etc::sourcelist": f"{folder}/archive.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::trusted": "/dev/null",
        "Dir::Etc::trustedparts": "/dev/null",
    }
    lines = [f"#clear {name};" for name in cleared]
    lines += [f'{name} "{value}";' for name, value in settings.items()]
    # Index targets beside the package lists (AppStream, command-not-found) come from other packages' configuration.
    lines += ['Acquire::IndexTargets::deb::Packages::DefaultEnabled "true";']
    return "\n".join(lines) + "\n"


def _parse_records(text: str) -> Iterable[PackageRecord]:
    for stanza in re.split(r"\n\s*\n", text):
        fields = parse_stanza(stanza)
        if {"package", "version", "filename", "sha256", "size"} <= fields.keys():
            yield PackageRecord(
                name=fields["package"],
                version=fields["version"],
                architecture=fields.get("architecture", ""),
                size_bytes=int(fields["size"]),
                sha256=fields["sha256"],
                pool_path=fields["filename"],
                depends=", ".join(filter(None, (fields.get("pre-depends", ""), fields.get("depends", "")))),
            )


def archive_key(archive: Archive) -> str:
    """A folder name for this archive's state."""
    covered = repr(archive) if archive.architecture == HOST else f"{archive.architecture} {archive!r}"
    return hashlib.sha256(covered.encode()).hexdigest()[:16]
