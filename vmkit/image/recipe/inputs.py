"""All an image is made of besides Debian packages, read once: templates, the user's files, vshd, the builder itself.

Their hashes go into the plan's digest, so the same reading decides whether the cache holds the image and what is built
when it does not.
"""

import hashlib
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError
from vmkit.image.recipe import resources
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.recipe.hostfile import HostFileError, read_host_file
from vmkit.image.recipe.settings import ContentKind, FileSpec
from vmkit.image.recipe.template import Template, read_templates
from vmkit.image.services import SERVICES, GuestService

# A kernel module or a test binary is megabytes; more than this belongs on a disk.
SOURCE_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Prebuilt:
    """A built image: its digest, its folder in the cache, and the file of its package lock."""

    digest: str
    folder: Path
    lock: Path


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a recipe takes from the host, read once.
    sources: the content of each host file a recipe names, by its guest path. templates: those of all its folders, by
    name. packages: the content of each file of the host's Python packages, by package and path. services: the same of
    our services. prebuilt: the images that are shipped in this one. hashes: a label and SHA-256 for all there is.
    """

    sources: dict[str, bytes]
    templates: dict[str, Template]
    vshd: dict[str, bytes]
    packages: dict[str, dict[str, bytes]]
    services: dict[str, dict[str, bytes]]
    prebuilt: tuple[Prebuilt, ...]
    hashes: tuple[tuple[str, str], ...]


def read_inputs(spec: ImageSpec, prebuilt: tuple[Prebuilt, ...] = ()) -> Inputs:
    """Reads what the recipe names on the host. Raises ConfigError naming a file that cannot be read."""
    sources = {file.path: _read_source(spec, file) for file in _host_files(spec)}
    vshd = _read_vshd()
    packages = {name: _read_package(spec, name) for name in spec.host_python}
    services = {name: _read_service(SERVICES[name]) for name in spec.services}
    hashes = {f"source {path}": data for path, data in sources.items()}
    hashes |= {f"vshd {path}": data for path, data in vshd.items()}
    hashes |= {f"package {name} {path}": data for name, files in packages.items() for path, data in files.items()}
    hashes |= {f"service {name} {path}": data for name, files in services.items() for path, data in files.items()}
    hashes |= {f"prebuilt {image.digest}": b"" for image in prebuilt}
    hashes |= {f"builder {path.name}": path.read_bytes() for path in resources.find_builder_sources()}
    templates = read_templates(spec.template_dirs, spec.recipes)
    hashes |= {f"template {name}": template.text.encode() for name, template in templates.items()}
    digests = tuple((label, hashlib.sha256(hashes[label]).hexdigest()) for label in sorted(hashes))
    return Inputs(sources, templates, vshd, packages, services, prebuilt, digests)


def find_outsiders(spec: ImageSpec) -> list[str]:
    """A line for each thing of the host that the recipe takes from outside its own folder, and those it extends.

    A recipe of a stranger could put a secret of yours into an image that you pass on.
    """
    homes = [*(path.parent.resolve() for path in spec.recipes), resources.find_templates_dir().resolve()]
    named = [(f"the source of {file.path}", Path(file.value)) for file in _host_files(spec)]
    named += [("a template folder", folder) for folder in spec.template_dirs]
    return [
        f"{spec.origin} takes {what} from outside its folder: {path.resolve()}"
        for what, path in named
        if not any(path.resolve().is_relative_to(home) for home in homes)
    ]


def _host_files(spec: ImageSpec) -> Iterator[FileSpec]:
    for file in (*spec.files, *((spec.hook,) if spec.hook else ())):
        if file.source is ContentKind.SOURCE:
            yield file


def _read_source(spec: ImageSpec, file: FileSpec) -> bytes:
    path = Path(file.value)
    try:
        return read_host_file(path, SOURCE_LIMIT_BYTES)
    except HostFileError as error:
        raise ConfigError(
            f"{spec.origin}: cannot read {path}, the source of {file.path}: {error}",
            hint="a relative path starts at the recipe's own folder",
        ) from error


def _read_vshd() -> dict[str, bytes]:
    folder = resources.find_vshd_dir()
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def _read_package(spec: ImageSpec, name: str) -> dict[str, bytes]:
    """A package of the Python that runs this, without what it has compiled; vmkit's with its recipes and templates."""
    folders = _find_package(name)
    if not folders:
        raise ConfigError(f"{spec.origin}: host_python: this Python has no package '{name}'")
    files = _read_folder(Path(folders[0]))
    if name == "vmkit":
        for label, folder in (("images", resources.find_images_dir()), ("templates", resources.find_templates_dir())):
            files |= {f"data/{label}/{path}": data for path, data in _read_folder(folder).items()}
    return files


def _read_service(service: GuestService) -> dict[str, bytes]:
    files = _read_folder(resources.find_service_dir(service.folder))
    return {path: data for path, data in files.items() if not path.startswith(service.of_host)}


def _find_package(name: str) -> list[str]:
    """The folders of a package. Nothing is imported: importlib.util.find_spec("a.b") would run a."""
    parts = name.split(".")
    try:
        found = importlib.util.find_spec(parts[0])
    except ValueError:
        return []
    for depth in range(2, len(parts) + 1):
        if found is None or found.submodule_search_locations is None:
            return []
        inner = ".".join(parts[:depth])
        found = importlib.machinery.PathFinder.find_spec(inner, list(found.submodule_search_locations))
    return list(found.submodule_search_locations or ()) if found is not None else []


def _read_folder(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
