"""Copies files out of a container: writes the engine's tar into a folder of the host, and nowhere else.

It does not trust the container's names: it takes only plain files and folders, and skips names that lead out.
"""

import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vmkit.errors import HostError

# Evidence of a whole failed suite is a few hundred MB.
MAX_RESULT_BYTES = 4 << 30


def write_results(chunks: Iterable[bytes], folder: Path) -> list[Path]:
    """Writes the files below the archive's top folder and returns them. Raises HostError when it cannot write them."""
    written: list[Path] = []
    total = 0
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _ChunkReader(chunks)), mode="r|") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                if not member.isfile() or not parts or ".." in parts:
                    continue
                total += member.size
                if total > MAX_RESULT_BYTES:
                    raise HostError(f"the results are larger than {MAX_RESULT_BYTES >> 30} GiB")
                source = archive.extractfile(member)
                assert source is not None
                written.append(_write(folder.joinpath(*parts), source, executable=bool(member.mode & 0o100)))
    except (OSError, tarfile.TarError) as error:
        raise HostError(
            f"cannot keep the results in {folder}: {error}", hint="name another folder: --out DIR"
        ) from error
    return written


def _write(path: Path, source: IO[bytes], *, executable: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        while data := source.read(1 << 16):
            target.write(data)
    path.chmod(0o755 if executable else 0o644)
    return path


class _ChunkReader:
    """Presents chunks as a file to read from, for tarfile's stream mode."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._left += chunk
        data, self._left = self._left[:size], self._left[size:]
        return data
