"""Recipe keys: how each value is checked, how it joins that of the recipe extended, and its default.

docs/reference/recipes.md has one row per key, and a test compares the two. Pure: a value is judged by its form alone,
no file is looked at.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from vmkit.errors import ConfigError
from vmkit.image.formats.tree import PATH_LIMIT_BYTES
from vmkit.image.services import SERVICES
from vmkit.image.wall.spec import CID_ANY, CID_HOST, CONNECT_CIDS_LIMIT, WALL_KEYS, KernelLayer

IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Debian Policy 5.6.1.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"[a-z][a-z0-9./_-]*")
_MODULE = re.compile(r"[A-Za-z0-9_-]+")
_PYTHON_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\??")
_PYTHON_PACKAGE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_KERNEL_ARG = re.compile(r"[\x21-\x7e]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIRROR = re.compile(r"(https?|file)://?[\x21-\x7e]+")

# The kernel's command line holds 2048 bytes on x86 (COMMAND_LINE_SIZE), and vmkit adds its own words.
KERNEL_ARGS_LIMIT_BYTES = 1024

Variable = str | int | bool | tuple[str | int | bool, ...]


class ContentKind(StrEnum):
    """Where a guest file's content comes from; each value is its key in a recipe."""

    TEMPLATE = "template"
    CONTENT = "content"
    SOURCE = "source"
    SYMLINK = "symlink"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One file of the guest. value is the template's name, the text, the host's path or the symlink's target."""

    path: str
    source: ContentKind
    value: str
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """Where in which recipe a value stands, for its error."""

    path: Path
    text: str
    keys: tuple[str, ...]

    def at(self, key: str) -> "KeyPlace":
        return KeyPlace(self.path, self.text, (*self.keys, key))

    def fail(self, what: str, hint: str = "") -> NoReturn:
        raise ConfigError(f"{self}: {what}", hint=hint)

    def unknown_key(self, known: Iterable[str]) -> ConfigError:
        close = difflib.get_close_matches(self.keys[-1], list(known), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the keys are: {', '.join(sorted(known))}"
        line = find_line(self.text, self.keys)
        return ConfigError(f"{self.path}:{line}: unknown key '{'.'.join(self.keys)}'", hint=hint)

    def __str__(self) -> str:
        return f"{self.path}:{find_line(self.text, self.keys)}: {'.'.join(self.keys)}"


def find_line(text: str, keys: tuple[str, ...]) -> int:
    """The line of a key in TOML text, 1 when it cannot be found.

    tomllib keeps no positions, so this looks for the key's last words.
    """
    for depth in range(len(keys), 0, -1):
        word = re.escape(keys[depth - 1])
        found = re.search(rf"^[ \t]*(?:\[.*)?[\"']?(?:[\w.-]+\.)?{word}[\"']?[ \t]*[\].=]", text, re.MULTILINE)
        found = found or re.search(rf"[{{,][ \t]*[\"']?{word}[\"']?[ \t]*=", text)
        if found:
            return text.count("\n", 0, found.end()) + 1
    return 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. parse gives the checked value; merge joins (base's value, own value)."""

    parse: Callable[[KeyPlace, Any], Any]
    default: Any
    merge: Callable[[Any, Any], Any]


def _replace(_base: Any, own: Any) -> Any:
    return own


def _append(base: tuple[Any, ...], own: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*base, *(value for value in own if value not in base))


def _join(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return base | own


def _text(place: KeyPlace, value: Any) -> str:
    if not isinstance(value, str):
        place.fail(f"must be text, not {_type_name(value)}")
    return value


def _flag(place: KeyPlace, value: Any) -> bool:
    if not isinstance(value, bool):
        place.fail(f"must be true/false, not {_type_name(value)}")
    return value


def _type_name(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a table"}
    return names.get(type(value), type(value).__name__)


def _word(pattern: re.Pattern[str], what: str) -> Callable[[KeyPlace, Any], str]:
    def parse(place: KeyPlace, value: Any) -> str:
        if not pattern.fullmatch(_text(place, value)):
            place.fail(f"'{value}' is not {what}")
        return str(value)

    return parse


def _words(pattern: re.Pattern[str], what: str) -> Callable[[KeyPlace, Any], tuple[str, ...]]:
    word = _word(pattern, what)

    def parse(place: KeyPlace, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            place.fail(f"must be a list, not {_type_name(value)}")
        return tuple(word(place, item) for item in value)

    return parse


def _modules(place: KeyPlace, value: Any) -> tuple[str, ...]:
    return tuple(name.replace("-", "_") for name in _words(_MODULE, "a kernel module's name")(place, value))


def _kernel_args(place: KeyPlace, value: Any) -> tuple[str, ...]:
    args = _words(_KERNEL_ARG, "one word of the kernel's command line")(place, value)
    if any(arg.startswith("vmkit.") for arg in args):
        place.fail("words that begin with 'vmkit.' are vmkit's own")
    if len(" ".join(args)) > KERNEL_ARGS_LIMIT_BYTES:
        place.fail(f"longer than {KERNEL_ARGS_LIMIT_BYTES} bytes together")
    return args


def _host_path(place: KeyPlace, value: Any) -> Path:
    """A path on the host; a relative one starts at the recipe's own folder."""
    if not _text(place, value):
        place.fail("must not be empty")
    return place.path.parent / Path(value).expanduser()


def _host_paths(place: KeyPlace, value: Any) -> tuple[Path, ...]:
    return (_host_path(place, value),)


def _images(place: KeyPlace, value: Any) -> tuple[str, ...]:
    """Images' names, and recipes' paths: a relative one starts at the recipe's own folder."""
    names = _words(re.compile(r"[^\0\n]+"), "an image's name or a recipe's path")(place, value)
    return tuple(str(_host_path(place, name)) if "/" in name or name.endswith(".toml") else name for name in names)


def _table(place: KeyPlace, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        place.fail(f"must be a table, not {_type_name(value)}")
    return value


def _extract(place: KeyPlace, value: Any) -> dict[str, tuple[str, ...]]:
    globs = _words(re.compile(r"[^/\n][^\n]*"), "a pattern of paths without a leading '/'")
    name = _word(_PACKAGE, "a Debian package's name")
    table = _table(place, value)
    return {name(place.at(key), key): globs(place.at(key), patterns) for key, patterns in table.items()}


def _variables(place: KeyPlace, value: Any) -> dict[str, Variable]:
    parsed: dict[str, Variable] = {}
    for key, item in _table(place, value).items():
        here = place.at(key)
        if not _VARIABLE.fullmatch(key):
            here.fail("a template variable's name is made of letters, digits and '_'")
        if isinstance(item, list) and all(isinstance(part, str | int | bool) for part in item):
            parsed[key] = tuple(item)
        elif isinstance(item, str | int | bool):
            parsed[key] = item
        else:
            here.fail(f"must be text, a number, true/false or a list of these, not {_type_name(item)}")
    return parsed


def _files(place: KeyPlace, value: Any) -> dict[str, FileSpec]:
    files = {}
    for guest_path, table in _table(place, value).items():
        here = place.at(guest_path)
        parts = guest_path.split("/")
        if parts[0] or len(parts) < 2 or {"", ".", ".."} & set(parts[1:]) or "\0" in guest_path:
            here.fail("a guest path begins with '/', names something below it, and has no empty part, '.' or '..'")
        if parts[1] in ("proc", "sys", "dev"):
            here.fail(f"/{parts[1]} is the kernel's: the guest would not see the file")
        if len(guest_path.encode()) > PATH_LIMIT_BYTES:
            here.fail("longer than Linux allows")
        files[guest_path] = _file(here, guest_path, _table(here, table))
    return files


_FILE_KEYS = (*ContentKind, "mode", "uid", "gid")


def _file(place: KeyPlace, guest_path: str, table: Mapping[str, Any]) -> FileSpec:
    for key in table:
        if key not in _FILE_KEYS:
            raise place.at(key).unknown_key(_FILE_KEYS)
    named = [source for source in ContentKind if source.value in table]
    if len(named) != 1:
        place.fail(f"needs exactly one of: {', '.join(ContentKind)}")
    source = named[0]
    here = place.at(source.value)
    value = table[source.value]
    match source:
        case ContentKind.SOURCE:
            text = str(_host_path(here, value))
        case ContentKind.DIRECTORY:
            if value is not True:
                here.fail("is written `directory = true`")
            text = ""
        case ContentKind.TEMPLATE:
            text = _word(re.compile(r"(?!/)(?!.*\.\.)[^\0\n]+"), "a template's name")(here, value)
        case ContentKind.CONTENT | ContentKind.SYMLINK:
            text = _text(here, value)
    default_mode = 0o755 if source is ContentKind.DIRECTORY else 0o644
    return FileSpec(
        path=guest_path,
        source=source,
        value=text,
        mode=_number(place, table, "mode", default_mode, 0o7777),
        uid=_number(place, table, "uid", 0, 0xFFFFFFFE),
        gid=_number(place, table, "gid", 0, 0xFFFFFFFE),
    )


def _number(place: KeyPlace, table: Mapping[str, Any], key: str, default: int, limit: int) -> int:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        shown = "0o7777" if key == "mode" else str(limit)
        hint = "modes are written in octal: mode = 0o755" if key == "mode" else ""
        place.at(key).fail(f"must be a number from 0 to {shown}", hint)
    return value


def _wall(place: KeyPlace, value: Any) -> dict[str, Any]:
    """The keys that are there, checked; vmkit.image.wall.spec.WallSpec has the others' defaults."""
    wall: dict[str, Any] = {}
    for key, item in _table(place, value).items():
        here = place.at(key)
        if key not in WALL_KEYS:
            raise here.unknown_key(WALL_KEYS)
        if key == "connect_cids":
            wall[key] = _connect_cids(here, item)
        elif key == "kernel":
            wall[key] = _kernel_layer(here, item)
        elif isinstance(item, bool):
            wall[key] = item
        else:
            here.fail(f"must be true/false, not {_type_name(item)}")
    return wall


def _kernel_layer(place: KeyPlace, value: Any) -> KernelLayer:
    if isinstance(value, bool):
        return KernelLayer.ON if value else KernelLayer.OFF
    if value != KernelLayer.REQUIRED.value:
        place.fail('must be true, false or "required"')
    return KernelLayer.REQUIRED


def _connect_cids(place: KeyPlace, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(isinstance(cid, bool) or not isinstance(cid, int) for cid in value):
        place.fail("must be a list of numbers")
    if len(value) > CONNECT_CIDS_LIMIT:
        place.fail(f"more than {CONNECT_CIDS_LIMIT} CIDs", "for an image open to all CIDs write `kernel = false`")
    for cid in value:
        if not CID_HOST < cid < CID_ANY:
            place.fail(
                f"{cid} is not a guest's CID ({CID_HOST + 1} to {CID_ANY - 1})",
                "2, the host, is always allowed, and 1 is the loopback that the wall is against",
            )
    return tuple(dict.fromkeys(value))


HOOK_PATH = "/etc/vmkit/hook"


def _hook(place: KeyPlace, value: Any) -> FileSpec:
    table: dict[str, Any] = {"source": value} if isinstance(value, str) else dict(_table(place, value))
    table.setdefault("mode", 0o755)
    spec = _file(place, HOOK_PATH, table)
    if spec.source in (ContentKind.SYMLINK, ContentKind.DIRECTORY):
        place.fail("a hook is a script: a host path, or a table with source, content or template")
    return spec


_KERNEL_FORMATS = re.compile(r"auto|vmlinux|vmlinuz")
_ROOTS = re.compile(r"initramfs|disk|given")
_INITS = re.compile(r"auto|systemd|none")
_SERVICES = re.compile("|".join(map(re.escape, SERVICES)))
_COMPRESSIONS = re.compile(r"none|gzip|lz4|zstd")

SETTINGS: dict[str, Setting] = {
    "extends": Setting(_text, "", _replace),
    "description": Setting(_text, "", _replace),
    "suite": Setting(_word(_SUITE, "a suite's name"), "auto", _replace),
    "mirror": Setting(_word(_MIRROR, "an http, https or file URL"), "", _replace),
    "components": Setting(_words(_SUITE, "a component's name"), ("main",), _replace),
    "keyring": Setting(_host_path, None, _replace),
    "kernel": Setting(_word(_PACKAGE, "a Debian package's name"), "", _replace),
    "kernel_suite": Setting(_word(_SUITE, "a suite's name"), "", _replace),
    "kernel_format": Setting(_word(_KERNEL_FORMATS, "one of auto, vmlinux, vmlinuz"), "auto", _replace),
    "kernel_args": Setting(_kernel_args, (), _append),
    "modules": Setting(_modules, (), _append),
    "modules_available": Setting(_modules, (), _append),
    "packages": Setting(_words(_PACKAGE, "a Debian package's name"), (), _append),
    "extract": Setting(_extract, {}, _join),
    "python_modules": Setting(_words(_PYTHON_MODULE, "a Python module's name"), (), _append),
    "host_python": Setting(_words(_PYTHON_PACKAGE, "a Python package's name"), (), _append),
    "prebuilt": Setting(_images, (), _append),
    "files": Setting(_files, {}, _join),
    "hook": Setting(_hook, None, _replace),
    "variables": Setting(_variables, {}, _join),
    "templates": Setting(_host_paths, (), _append),
    "services": Setting(_words(_SERVICES, f"a service: {', '.join(SERVICES)}"), (), _append),
    "wall": Setting(_wall, {}, _join),
    "root": Setting(_word(_ROOTS, "one of initramfs, disk, given"), "initramfs", _replace),
    "init": Setting(_word(_INITS, "one of auto, systemd, none"), "auto", _replace),
    "bootstrap": Setting(_flag, False, _replace),
    "default_user": Setting(_word(_USER, "a user's name"), "root", _replace),
    "compression": Setting(_word(_COMPRESSIONS, "one of none, gzip, lz4, zstd"), "none", _replace),
}
