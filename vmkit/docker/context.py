"""The build context: the files that .dockerignore allows, as a tar that is the same for the same files.

The tar has fixed times and owners, so that the same files give the same layers.
"""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vmkit.errors import ConfigError

DOCKERFILE = "Dockerfile"
IGNORE_FILE = ".dockerignore"
# The project's own is 3 MB; more than this is a disk image that lies in the checkout.
MAX_CONTEXT_BYTES = 64 << 20


def find_context(named: Path | None) -> Path:
    """Returns the folder to build: the named one, else the current one, else the checkout that this program is in."""
    if named is not None:
        if not (named / DOCKERFILE).is_file():
            raise ConfigError(f"{named} holds no {DOCKERFILE}", hint="name a checkout of the project")
        return named
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (folder / DOCKERFILE).is_file() and (folder / "vmkit").is_dir():
            return folder
    raise ConfigError(
        "vmkit builds the image from a checkout of the project, and this folder is not one",
        hint="clone the project and run: vmkit docker build CHECKOUT",
    )


def find_files(folder: Path) -> list[str]:
    """Returns the context's files and folders, relative and sorted."""
    from docker.utils import exclude_paths  # noqa: PLC0415  (an extra, and slow to import)

    ignore = folder / IGNORE_FILE
    patterns = [line.strip() for line in ignore.read_text().splitlines()] if ignore.exists() else []
    return sorted(exclude_paths(str(folder), [line for line in patterns if line and not line.startswith("#")]))


def write_context(folder: Path, names: Sequence[str], target: IO[bytes]) -> int:
    """Writes the tar and returns the bytes of the files in it. Raises ConfigError when they are too many."""
    total = 0
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            info = archive.gettarinfo(str(folder / name), arcname=name)
            if info is None or not (info.isfile() or info.isdir() or info.issym()):
                continue
            total += info.size
            if total > MAX_CONTEXT_BYTES:
                raise ConfigError(
                    f"the build context is larger than {MAX_CONTEXT_BYTES >> 20} MiB; at '{name}' it was too much",
                    hint=f"take large files out of the checkout, or name them in {IGNORE_FILE}",
                )
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            info.mode = 0o755 if info.mode & 0o100 else 0o644
            if info.isfile():
                with (folder / name).open("rb") as source:
                    archive.addfile(info, source)
            else:
                archive.addfile(info)
    return total
