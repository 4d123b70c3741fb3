"""A share as its user writes it: HOST[:GUEST][:ro]."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError, HostError

READ_ONLY, WRITABLE = "ro", "rw"
# Below it a folder gets its own name, where the user names no place.
GUEST_FOLDER = "/mnt"


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """A folder of this host, absolute, and where a guest has it."""

    host: Path
    guest: str
    read_only: bool = False

    def render(self) -> str:
        """As it can be written."""
        return f"{self.host}:{self.guest}" + (f":{READ_ONLY}" if self.read_only else "")


def parse_place(text: str) -> SharedPlace:
    """Raises ConfigError."""
    words = text.split(":")
    mode = words.pop() if len(words) > 1 and words[-1] in (READ_ONLY, WRITABLE) else WRITABLE
    if len(words) > 2:
        is_wrong_mode = text.count(":") == 2 and not words[2].startswith("/")
        wrong = f"ends with '{words[2]}', and a share's mode is ro or rw" if is_wrong_mode else "has more colons"
        raise ConfigError(
            f"a share is HOST[:GUEST][:ro], and '{text}' {wrong}",
            hint="a folder with a colon in its name: share the one above, or a symlink to it",
        )
    if not words[0]:
        raise ConfigError(f"'{text}' names no folder of this host", hint="for the present one: .")
    return make_place(words[0], words[1] if len(words) == 2 else "", read_only=mode == READ_ONLY)


def make_place(host: str, guest: str = "", *, read_only: bool = False) -> SharedPlace:
    """A share of a folder of this host. guest: its place there; "": /mnt and the folder's name. Raises ConfigError."""
    folder = _find_host(host)
    if not guest:
        # realpath() takes a loop of links as a name; Path.resolve() raises RuntimeError.
        name = Path(os.path.realpath(folder)).name
        if not name:
            raise ConfigError(f"'{host}' needs a place in the guest", hint=f"such as {host}:{GUEST_FOLDER}/host")
        guest = f"{GUEST_FOLDER}/{name}"
    if not guest.startswith("/") or ".." in guest.split("/") or not guest.strip("/"):
        raise ConfigError(f"the guest's folder must be an absolute path other than /, without .., not '{guest}'")
    # As the guest's list of mounts has it.
    guest = "/" + "/".join(word for word in guest.split("/") if word not in ("", "."))
    return SharedPlace(folder, guest, read_only)


def _find_host(word: str) -> Path:
    """Raises ConfigError."""
    try:
        return Path(word).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"this host has no home folder for '{word}'", hint=f"for a folder of that name: ./{word}"
        ) from error


def check_folder(place: SharedPlace) -> None:
    """Raises HostError for a folder that cannot be shared."""
    try:
        # Path.is_dir() says only whether, and not why not.
        is_folder = stat.S_ISDIR(place.host.stat().st_mode)
    except FileNotFoundError:
        raise HostError(f"cannot share {place.host}: it does not exist") from None
    except OSError as error:
        raise HostError(f"cannot share {place.host}: {error.strerror}") from error
    if not is_folder:
        raise HostError(f"cannot share {place.host}: it is not a directory")
