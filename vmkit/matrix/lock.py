"""The lock of a matrix: the digest of each image, root and kernel that its cells run. All nodes then run the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError
from vmkit.matrix.cellfolder import explain_errors, write_whole
from vmkit.matrix.plan import Cell, Matrix
from vmkit.matrix.reading import open_file

SCHEMA = 1
# 100,000 kernels.
MAX_LOCK_BYTES = 32 << 20
# As render_lock writes it.
_BEGIN = b'{\n "schema": '


@dataclass(frozen=True, slots=True)
class MatrixLock:
    """matrix: the digest of the file's plan. images, kernels: their digests, by the names that name_image gives, and
    by the file names of kernels.
    """

    matrix: str
    images: Mapping[str, str]
    kernels: Mapping[str, str]


def find_matrix_lock(file: Path) -> Path:
    """Returns where the lock of a matrix is: `NAME.lock` beside `NAME.toml`."""
    return file.with_suffix(".lock")


def name_image(cell: Cell) -> str:
    """Returns what a lock calls the image of a cell."""
    return f"{cell.image_name}/{cell.architecture}"


def describe_lock(matrix: Matrix, numbers: Iterable[int], images: Mapping[str, str]) -> MatrixLock:
    """Returns what these cells have here. images: the digests of theirs. Raises ConfigError for a missing kernel."""
    kernels = dict.fromkeys(matrix.cells[number].kernel for number in numbers)
    found = {path.name: hash_file(path, "the kernel") for path in kernels if path is not None}
    return MatrixLock(matrix.digest, images, found)


def find_content(lock: MatrixLock, cell: Cell) -> str:
    """Returns the digest of what a cell runs: of its image and its kernel."""
    kernel = "" if cell.kernel is None else lock.kernels[cell.kernel.name]
    return hashlib.sha256(f"{lock.images[name_image(cell)]} {kernel}".encode()).hexdigest()


def write_lock(path: Path, lock: MatrixLock) -> None:
    """Writes a lock, whole. Raises HostError, and ConfigError for a path that has a file of another kind."""
    try:
        with open_file(path) as file:
            begin = file.read(len(_BEGIN))
    except (FileNotFoundError, NotADirectoryError):
        begin = b""
    except OSError as error:
        # What vmkit cannot read may be the work of another program.
        raise ConfigError(f"cannot replace {path}: {error.strerror}", hint="rename your matrix") from error
    # Other programs have locks of this name, too, and even a matrix may have it.
    if begin and begin != _BEGIN:
        raise ConfigError(f"{path} is no lock of a matrix, and vmkit does not replace it", hint="rename your matrix")
    with explain_errors(path.parent, hint="a lock is beside its matrix: copy that to a directory of your own"):
        write_whole(path, render_lock(lock))


def check_lock(file: Path, found: MatrixLock) -> None:
    """Refuses what the lock beside a matrix file has not, if there is one. Raises ConfigError."""
    path = find_matrix_lock(file)
    try:
        with open_file(path) as source:
            data = source.read(MAX_LOCK_BYTES + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot read the lock {path}: {error.strerror}") from error
    compare_matrix_locks(parse_matrix_lock(data, path, file), found, path, file)


def hash_file(path: Path, what: str) -> str:
    """Returns the digest of a kernel or a disk. Raises ConfigError."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error


def render_lock(lock: MatrixLock) -> bytes:
    """Returns the content of a lock: a change of one image is a change of one line."""
    value = {
        "schema": SCHEMA,
        "matrix": lock.matrix,
        "images": dict(sorted(lock.images.items())),
        "kernels": dict(sorted(lock.kernels.items())),
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def parse_matrix_lock(data: bytes, path: Path, file: Path) -> MatrixLock:
    """Reads a lock. file: of the matrix, for errors. Raises ConfigError."""
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ConfigError(
                f"{path} is a lock of another version of vmkit (schema {value['schema']})", hint=_renew(file)
            )
        images, kernels = (
            {str(name): str(digest) for name, digest in value[key].items()} for key in ("images", "kernels")
        )
        return MatrixLock(str(value["matrix"]), images, kernels)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the lock {path} is damaged: {error!r}", hint=_renew(file)) from error


def compare_matrix_locks(lock: MatrixLock, found: MatrixLock, path: Path, file: Path) -> None:
    """Raises ConfigError where what was found is another than the lock has. found: of the cells that are to run."""
    if found.matrix != lock.matrix:
        raise ConfigError(f"{file} was changed after {path} was written", hint=_renew(file))
    for kind, wanted, ours in (("image", lock.images, found.images), ("kernel", lock.kernels, found.kernels)):
        for name, digest in ours.items():
            if wanted.get(name) != digest:
                raise ConfigError(
                    f"the {kind} {name} is another than {path} has",
                    details=f"locked: {wanted.get(name, 'none')}\nhere:   {digest}",
                    hint=_explain(kind, file),
                )


def _explain(kind: str, file: Path) -> str:
    way = "bring the image here: vmkit build --export, vmkit image import; " if kind == "image" else ""
    return f"{way}or {_renew(file)}" if way else _renew(file)


def _renew(file: Path) -> str:
    return f"lock what is here: vmkit matrix lock {file}"
