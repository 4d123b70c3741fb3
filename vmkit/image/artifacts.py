"""The files of a finished image: the size and hash that its manifest has of each, and whether they still match.

Size and SHA-256 are compared once, and again only when a file's inode, size, mtime or ctime is another than when they
were compared. So a start reads none of the hundreds of megabytes, and a damaged or replaced file is not served.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmkit.errors import BuildError
from vmkit.image.cache import write_atomically
from vmkit.image.debian.packages import hash_file


def describe_artifacts(folder: Path) -> dict[str, dict[str, object]]:
    """SHA-256 and size of every file of `folder`. Raises BuildError for an empty one."""
    described: dict[str, dict[str, object]] = {}
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        if not size:
            raise BuildError(f"the build made an empty file: {path.name}", hint="vmkit kept nothing; build it again")
        described[path.name] = {"sha256": hash_file(path), "size_bytes": size}
    return described


def are_whole(folder: Path, artifacts: Mapping[str, Any], note: Path) -> bool:
    """Whether the files of `folder` are those of the manifest's `artifacts`.

    note: the file that keeps the result of the last comparison. Raises OSError for a missing file, and KeyError or
    TypeError for a malformed manifest.
    """
    known = _read_note(note)
    found: dict[str, object] = {}
    for name, entry in artifacts.items():
        path = folder / name
        status = path.stat()
        if not status.st_size or status.st_size != entry["size_bytes"]:
            return False
        found[name] = [entry["sha256"], *_identify(status)]
        if known.get(name) != found[name] and hash_file(path) != entry["sha256"]:
            return False
    if found != known:
        # If the note cannot be written, the next start compares the files again.
        with suppress(OSError):
            write_atomically(note, json.dumps(found).encode())
    return True


def _identify(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_note(path: Path) -> dict[str, object]:
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
