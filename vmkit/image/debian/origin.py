"""Where Debian packages come from on this host: suite, mirror and keyring, when a recipe does not say.

Reads the host's os-release, apt sources and keyrings; uses no network and changes nothing.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmkit.errors import ConfigError, HostError

# What vmkit is made and tested against; its keys are in bookworm's keyring too.
PREFERRED_SUITE = "trixie"
PUBLIC_MIRROR = "http://deb.debian.org/debian"
MIRROR_VARIABLE = "VMKIT_MIRROR"

_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
_ONE_LINE = re.compile(r"^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.+)$")
# A sources file is a page of text.
_SOURCES_LIMIT_BYTES = 1 << 20


def find_keyring(folder: Path = Path("/usr/share/keyrings")) -> Path:
    """Debian's archive keyring. Raises HostError where it is not installed."""
    for name in _KEYRINGS:
        if (folder / name).is_file():
            return folder / name
    raise HostError(
        "this host lacks Debian's archive keyring, so vmkit cannot verify packages",
        details=f"looked for {' and '.join(_KEYRINGS)} in {folder}",
        hint="install it: sudo apt-get install debian-archive-keyring",
    )


def find_host_suite(root: Path = Path("/")) -> str | None:
    """The host's own suite (`bookworm`) when the host is Debian."""
    release = _read_os_release(root)
    return release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None


def choose_suites(suite: str, root: Path = Path("/")) -> tuple[str, ...]:
    """The suites to try in turn: the named one, or for `auto` the preferred one, then the host's."""
    if suite != "auto":
        return (suite,)
    host = find_host_suite(root)
    return (PREFERRED_SUITE,) if host in (None, PREFERRED_SUITE) else (PREFERRED_SUITE, str(host))


def choose_mirror(mirror: str, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> str:
    """The recipe's mirror, else VMKIT_MIRROR, else the one of the host's own Debian sources, else the public one."""
    named = environ.get(MIRROR_VARIABLE, "")
    if named and not re.match(r"(https?|file):/", named):
        raise ConfigError(f"{MIRROR_VARIABLE}='{named}' is not an http, https or file URL")
    return (mirror or named or _find_host_mirror(root) or PUBLIC_MIRROR).rstrip("/")


def _find_host_mirror(root: Path) -> str | None:
    suite = find_host_suite(root)
    if suite is None:
        return None
    for uri, suites, components in _read_sources(root / "etc/apt"):
        # Only a whole archive will do: not security.debian.org, not a vendor's repository.
        usable = re.match(r"https?://", uri) and uri.rstrip("/").endswith("/debian")
        if usable and {suite, "stable", "testing"} & set(suites) and "main" in components:
            return uri
    return None


def _read_sources(apt: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    folder = apt / "sources.list.d"
    for path in (apt / "sources.list", *sorted(folder.glob("*.list"))):
        for line in _read(path).splitlines():
            found = _ONE_LINE.match(line.strip())
            if found:
                yield found[1], [found[2]], found[3].split()
    for path in sorted(folder.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", _read(path)):
            fields = parse_stanza(stanza)
            if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
                for uri in fields.get("uris", "").split():
                    yield uri, fields.get("suites", "").split(), fields.get("components", "").split()


def parse_stanza(stanza: str) -> dict[str, str]:
    """A deb822 paragraph as lower-case field name and value; continuation lines are joined."""
    fields: dict[str, str] = {}
    key = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            fields[key] = fields.get(key, "") + "\n" + line.strip()
        else:
            key, colon, value = line.partition(":")
            key = key.strip().lower()
            if colon:
                fields[key] = value.strip()
    return fields


def _read_os_release(root: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in _read(root / "etc/os-release").splitlines())
    return {key: value.strip("\"'") for key, _, value in pairs}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return source.read(_SOURCES_LIMIT_BYTES).decode(errors="replace")
    except OSError:
        return ""
