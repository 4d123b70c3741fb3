"""Recipes: TOML text becomes a frozen ImageSpec, or a ConfigError that names the file and the line or key.

Owns every key a recipe may hold (docs/reference/recipes.md lists them) and how a recipe extends another. Knows nothing
of packages, caches or QEMU: paths and names are checked for form here and looked up by the modules that use them.
"""

import difflib
import logging
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vmkit.architectures import HOST, find_architecture
from vmkit.errors import ConfigError
from vmkit.image.recipe import resources
from vmkit.image.recipe.hostfile import HostFileError, read_host_file
from vmkit.image.recipe.settings import IMAGE_NAME, SETTINGS, FileSpec, KeyPlace, Variable, find_line
from vmkit.image.services import SERVICES
from vmkit.image.wall.spec import LOOPBACK_MODULE, WallSpec

# A recipe is a page of text; a gigabyte named by mistake must not be read.
RECIPE_LIMIT_BYTES = 1 << 20
# tiny <- mine <- this-experiment is three; more is a loop or a maze.
EXTENDS_LIMIT = 8
# Old names of shipped images, which go on.
RENAMED = {"host": "nested"}
# As a recipe's kernel: the one that the architecture has.
AUTO = "auto"

log = logging.getLogger("vmkit.image")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image as its recipe, and those it extends, describe it. recipes: their paths, nearest first."""

    name: str
    origin: Path
    recipes: tuple[Path, ...]
    description: str
    suite: str
    mirror: str
    components: tuple[str, ...]
    keyring: Path | None
    kernel: str
    kernel_suite: str
    kernel_format: str
    kernel_args: tuple[str, ...]
    modules: tuple[str, ...]
    modules_available: tuple[str, ...]
    packages: tuple[str, ...]
    extract: tuple[tuple[str, tuple[str, ...]], ...]
    python_modules: tuple[str, ...]
    host_python: tuple[str, ...]
    prebuilt: tuple[str, ...]
    files: tuple[FileSpec, ...]
    hook: FileSpec | None
    variables: tuple[tuple[str, Variable], ...]
    template_dirs: tuple[Path, ...]
    services: tuple[str, ...]
    wall: WallSpec
    root: str
    init: str
    bootstrap: bool
    default_user: str
    compression: str
    architecture: str = HOST


def list_images() -> tuple[ImageSpec, ...]:
    """The shipped images, by name."""
    return tuple(_load(path, path.stem) for path in sorted(resources.find_images_dir().glob("*.toml")))


def load_image(name_or_path: str, architecture: str = HOST) -> ImageSpec:
    """The image of a shipped name (`tiny`) or of a recipe file (`./my.toml`), for guests of an architecture.

    Raises ConfigError when there is none, or when the recipe is wrong.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        name = path.stem
        if not IMAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot be an image's name, and the recipe's file name is that name",
                hint="use lower-case letters, digits, '-', '_' and '.', and begin with a letter or digit",
            )
        return _load(path, name, architecture)
    path = _find_shipped(name_or_path, is_typed=True)
    return _load(path, path.stem, architecture)


def find_mention(spec: ImageSpec, *spellings: str, key: str = "") -> str:
    """`file:line` of the recipe that names a word, for an error found long after the recipe was read.

    key: where it stands; the search begins there.
    """
    for path, layer in _read_layers(spec.origin):
        if key and key not in layer:
            continue
        text = _read_text(path)
        start = len("".join(text.splitlines(keepends=True)[: find_line(text, (key,)) - 1])) if key else 0
        for word in (*(f'"{spelling}"' for spelling in spellings), *spellings):
            at = text.find(word, start)
            if at >= 0:
                return f"{path}:{text.count(chr(10), 0, at) + 1}"
    return str(spec.origin)


def _find_shipped(name: str, *, is_typed: bool = False) -> Path:
    """is_typed: a person gave the name, and may mean a file or folder of the present directory."""
    if name in RENAMED:
        _warn_of_old_name(name)
        name = RENAMED[name]
    path = resources.find_images_dir() / f"{name}.toml"
    if IMAGE_NAME.fullmatch(name) and path.is_file():
        return path
    known = sorted(found.stem for found in resources.find_images_dir().glob("*.toml"))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"for a recipe of your own, give its path: ./{name}.toml"
    if is_typed and _is_here(name):
        hint = f"for the one in this directory, give its path: {shlex.quote(f'./{name}')}"
    raise ConfigError(f"there is no image '{name}'; the images are: {', '.join(known)}", hint=hint)


def _is_here(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:
        # Such as a name that is longer than a file's can be.
        return False


@cache
def _warn_of_old_name(name: str) -> None:
    """Once in a process, however often it loads the recipe."""
    log.warning("the image '%s' is called '%s' now", name, RENAMED[name])


def _load(path: Path, name: str, architecture: str = HOST) -> ImageSpec:
    row = find_architecture(architecture)
    merged: dict[str, Any] = {}
    layers = _read_layers(path)
    for _, layer in reversed(layers):
        for key, value in layer.items():
            setting = SETTINGS[key]
            merged[key] = setting.merge(merged[key], value) if key in merged else value
    merged.pop("extends", None)
    values = {key: setting.default for key, setting in SETTINGS.items() if key != "extends"} | merged
    if not values["kernel"]:
        raise ConfigError(
            f"{path}: the recipe names no kernel",
            hint=f'add `extends = "tiny"`, or `kernel = "{AUTO}"`',
        )
    if values["kernel"] == AUTO:
        values["kernel"] = row.kernel
    needed = (package for service in values["services"] for package in SERVICES[service].packages)
    values["packages"] = tuple(dict.fromkeys((*values["packages"], *needed)))
    files: dict[str, FileSpec] = values.pop("files")
    variables: dict[str, Variable] = values.pop("variables")
    extract: dict[str, tuple[str, ...]] = values.pop("extract")
    templates: tuple[Path, ...] = values.pop("templates")
    wall = WallSpec(**values.pop("wall"))
    spec = ImageSpec(
        name=name,
        origin=path,
        recipes=tuple(layer_path for layer_path, _ in layers),
        files=tuple(files[guest_path] for guest_path in sorted(files)),
        variables=tuple(sorted(variables.items())),
        extract=tuple((package, tuple(map(row.expand, extract[package]))) for package in sorted(extract)),
        # The user's templates are looked at first, the shipped ones last.
        template_dirs=(*reversed(templates), resources.find_templates_dir()),
        wall=wall,
        architecture=architecture,
        # SETTINGS' parsers made each value; a test holds the two together.
        **values,
    )
    _check_wall(spec)
    if spec.services and not spec.bootstrap:
        raise ConfigError(
            f"{find_mention(spec, spec.services[0], key='services')}: services: {spec.services[0]} needs Debian's own"
            " Python, and this image has a part of it",
            hint='add `extends = "debian"`, or `bootstrap = true`',
        )
    if "init" in merged and spec.root != "given":
        raise ConfigError(
            f"{find_mention(spec, 'init', key='init')}: init: the image has an init of its own",
            hint='only an image with root = "given" can take that of its root',
        )
    if row.is_emulated and spec.bootstrap:
        raise ConfigError(
            f"vmkit cannot build the image {name} for {architecture}: programs of its packages would run on this host",
            hint=f"take tiny, or a recipe without `bootstrap`, or a root of yours: vmkit up PATH --arch {architecture}",
        )
    return spec


def _check_wall(spec: ImageSpec) -> None:
    if spec.wall.transport and LOOPBACK_MODULE in spec.modules:
        where = find_mention(spec, LOOPBACK_MODULE, LOOPBACK_MODULE.replace("_", "-"), key="modules")
        raise ConfigError(
            f"{where}: modules: the guest does not load {LOOPBACK_MODULE} while the wall's transport layer is on",
            hint="with it any user of the guest could speak to vshd as if it were the host; "
            "`modules_available` ships it without loading it, `[wall] transport = false` allows it",
        )


def _read_layers(path: Path) -> list[tuple[Path, dict[str, object]]]:
    """The recipe first, then the ones it extends, nearest first."""
    layers: list[tuple[Path, dict[str, object]]] = []
    while True:
        if len(layers) >= EXTENDS_LIMIT or path.resolve() in [seen.resolve() for seen, _ in layers]:
            raise ConfigError(f"{path}: the recipe extends itself, or more than {EXTENDS_LIMIT} others")
        layer = _read_layer(path)
        layers.append((path, layer))
        base = layer.get("extends")
        if not base:
            return layers
        assert isinstance(base, str)
        path = _find_base(path, base)


def _find_base(path: Path, base: str) -> Path:
    """The recipe that `path` extends. Raises ConfigError, naming `path`."""
    try:
        if "/" not in base and not base.endswith(".toml"):
            return _find_shipped(base)
        found = path.parent / base
        if not found.exists():
            raise ConfigError(f"there is no recipe {found}", hint="a relative path starts at the recipe's own folder")
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error.brief}", hint=error.hint) from error
    return found


def _read_layer(path: Path) -> dict[str, object]:
    text = _read_text(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # tomllib's message ends with "(at line N, column M)".
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    layer: dict[str, object] = {}
    for key, value in table.items():
        place = KeyPlace(path, text, (key,))
        if key not in SETTINGS:
            raise place.unknown_key(SETTINGS)
        layer[key] = SETTINGS[key].parse(place, value)
    return layer


def _read_text(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"there is no recipe {path}", hint="`vmkit images` lists the shipped images")
    try:
        raw = read_host_file(path, RECIPE_LIMIT_BYTES)
    except HostFileError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    try:
        # A byte order mark is no part of the text.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: a recipe is UTF-8 text, and this line is not") from error


__all__ = ["FileSpec", "ImageSpec", "Variable", "find_line", "list_images", "load_image"]
