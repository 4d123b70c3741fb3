"""All an image is made of besides Debian packages, read once: templates, the user's files, vshd, the builder itself.

Their hashes go into the plan's digest, so the same reading decides whether the cache holds the image and what is built
when it does not.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError
from vmkit.image.recipe import resources
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.recipe.settings import FileSpec, Source

# A kernel module or a test binary is megabytes; more than this belongs on a disk.
SOURCE_LIMIT_BYTES = 256 << 20
# A template folder named by mistake (a home directory) must not be read to its end.
TEMPLATE_COUNT_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Prebuilt:
    """A built image: its digest, its folder in the cache, and the file of its package lock."""

    digest: str
    folder: Path
    lock: Path


@dataclass(frozen=True, slots=True)
class Inputs:
    """sources.

    The content of each host file a recipe names, by its guest path. packages: that of each file of the host's Python
    packages, by package and path. prebuilt: the images that are shipped in this one. hashes: a label and SHA-256 for
    all there is.
    """

    sources: dict[str, bytes]
    vshd: dict[str, bytes]
    packages: dict[str, dict[str, bytes]]
    prebuilt: tuple[Prebuilt, ...]
    hashes: tuple[tuple[str, str], ...]


def read_inputs(spec: ImageSpec, prebuilt: tuple[Prebuilt, ...] = ()) -> Inputs:
    """Reads what the recipe names on the host. Raises ConfigError naming a file that cannot be read."""
    sources = {file.path: _read_source(spec, file) for file in _host_files(spec)}
    vshd = _read_vshd()
    packages = {name: _read_package(spec, name) for name in spec.host_python}
    hashes = {f"source {path}": data for path, data in sources.items()}
    hashes |= {f"vshd {path}": data for path, data in vshd.items()}
    hashes |= {f"package {name} {path}": data for name, files in packages.items() for path, data in files.items()}
    hashes |= {f"prebuilt {image.digest}": b"" for image in prebuilt}
    hashes |= {f"builder {path.name}": path.read_bytes() for path in resources.find_builder_sources()}
    for index, folder in enumerate(spec.template_dirs):
        hashes |= {
            f"template {index} {path.relative_to(folder)}": _read_template(path) for path in _find_templates(folder)
        }
    digests = tuple((label, hashlib.sha256(hashes[label]).hexdigest()) for label in sorted(hashes))
    return Inputs(sources, vshd, packages, prebuilt, digests)


def _host_files(spec: ImageSpec) -> Iterator[FileSpec]:
    for file in (*spec.files, *((spec.hook,) if spec.hook else ())):
        if file.source is Source.SOURCE:
            yield file


def _read_source(spec: ImageSpec, file: FileSpec) -> bytes:
    path = Path(file.value)
    try:
        with path.open("rb") as source:
            data = source.read(SOURCE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{spec.origin}: cannot read {path}, the source of {file.path}: {error.strerror}",
            hint="a relative path starts at the recipe's own folder",
        ) from error
    if len(data) > SOURCE_LIMIT_BYTES:
        raise ConfigError(
            f"{spec.origin}: {path}, the source of {file.path}, is larger than {SOURCE_LIMIT_BYTES >> 20} MiB"
        )
    return data


def _read_vshd() -> dict[str, bytes]:
    folder = resources.find_vshd_dir()
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def _read_package(spec: ImageSpec, name: str) -> dict[str, bytes]:
    """A package of the Python that runs this, without what it has compiled; vmkit's with its recipes and templates."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if not folders:
        raise ConfigError(f"{spec.origin}: host_python: this Python has no package '{name}'")
    files = _read_folder(Path(folders[0]))
    if name == "vmkit":
        for label, folder in (("images", resources.find_images_dir()), ("templates", resources.find_templates_dir())):
            files |= {f"data/{label}/{path}": data for path, data in _read_folder(folder).items()}
    return files


def _read_folder(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _find_templates(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"the template folder {folder} does not exist")
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            found.append(path)
        if len(found) > TEMPLATE_COUNT_LIMIT:
            raise ConfigError(f"the template folder {folder} holds more than {TEMPLATE_COUNT_LIMIT} files")
    return sorted(found)


def _read_template(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the template {path}: {error.strerror}") from error
