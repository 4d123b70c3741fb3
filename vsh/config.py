"""The user's configuration: defaults for flags, for every session and per host alias, from one small TOML file.

    [default]
    keepalive = 60

    [host.web]
    vm_name = "tiny"
    user = "alice"
    env = ["LANG=C.UTF-8"]

Keys are the names of flags and have their rules. The command line wins over a host's table, and that wins over
[default]. Knows nothing of what flags do.
"""

import os
import stat

from vsh.errors import VshError
from vsh.flags import KINDS, LASTING_KINDS, Options, find_config_path, set_flag

# A configuration is a few lines.
SIZE_MAX = 256 * 1024
STATUS = 64
# Documentation/admin-guide/devices.txt
DEV_NULL = os.makedev(1, 3)
SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
ADDRESSES = frozenset(("cid", "vm_name", "uds", "unix"))
# What makes no sense as a default.
FORBIDDEN = frozenset(
    ("fd", "help", "version", "completion", "launcher", "list_hosts", "proxy", "fdpass", "forward_only", *LASTING_KINDS)
)

Table = dict[str, object]


def apply_config(options: Options) -> None:
    """Sets those `options` that the command line left alone. Raises VshError naming file and key."""
    path = find_config_path()
    tables = _read(path)
    if tables is None:
        return
    default, hosts = _split(path, tables)
    _apply_container(path, tables, options)
    name = options.vm_name
    host = hosts.get(name, {})
    if ADDRESSES & host.keys():
        # The alias is not the name of a machine.
        options.given.discard("vm_name")
        options.vm_name = ""
        options.alias = name
    for where, table in ((f"host.{name}", host), ("default", default)):
        _apply(path, where, table, options)


def list_hosts() -> list[str]:
    """Returns the host aliases, for completion."""
    path = find_config_path()
    tables = _read(path)
    return [] if tables is None else sorted(_split(path, tables)[1])


def _apply(path: str, where: str, table: Table, options: Options) -> None:
    # Only one address counts: a host's is as good as the command line's, and both win over the default.
    if ADDRESSES & options.given:
        table = {key: value for key, value in table.items() if key not in ADDRESSES}
    taken = frozenset(options.given)
    for key, value in table.items():
        if key in taken:
            continue
        if key not in KINDS or key in FORBIDDEN:
            raise VshError(f"{path}: {where}.{key}: no such key", hint="keys are the names of flags", status=STATUS)
        try:
            for text in _texts(value):
                set_flag(options, key, text)
        except VshError as error:
            raise VshError(f"{path}: {where}.{key}: {error.brief}", status=STATUS) from error


def _apply_container(path: str, tables: Table, options: Options) -> None:
    """Sets how vsh starts a vshd in a container: the words of a command, and whether that vshd is ChromeOS's."""
    container = tables.get("container", {})
    if not isinstance(container, dict) or set(container) - {"launch", "legacy"}:
        raise VshError(f"{path}: container is a table with the keys launch and legacy", status=STATUS)
    launch = container.get("launch", [])
    if not isinstance(launch, list) or not all(isinstance(word, str) for word in launch):
        raise VshError(f"{path}: container.launch is a list of words", status=STATUS)
    legacy = container.get("legacy", False)
    if not isinstance(legacy, bool):
        raise VshError(f"{path}: container.legacy is true or false", status=STATUS)
    options.launch = launch
    options.is_legacy_container = legacy


def _texts(value: object) -> list[str]:
    """Returns a TOML value as the words of a command line."""
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, int | float | str):
        return [str(value)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise VshError(f"{value!r} is no value of a flag")


def _split(path: str, tables: Table) -> tuple[Table, dict[str, Table]]:
    default = tables.get("default", {})
    hosts = tables.get("host", {})
    unknown = sorted(set(tables) - {"default", "host", "container"})
    if unknown:
        raise VshError(
            f"{path}: {unknown[0]}: no such table", hint="there are [default] and [host.NAME]", status=STATUS
        )
    if not isinstance(default, dict) or not isinstance(hosts, dict):
        raise VshError(f"{path}: 'default' and 'host' are tables", status=STATUS)
    for name, table in hosts.items():
        if not isinstance(table, dict):
            raise VshError(f"{path}: host.{name} is no table", status=STATUS)
    return default, hosts


def _read(path: str) -> Table | None:
    """Reads the file's tables; None when there is no file, or /dev/null in its place."""
    data = _read_file(path)
    if data is None:
        return None
    if len(data) > SIZE_MAX:
        raise VshError(f"{path} is larger than {SIZE_MAX} bytes", status=STATUS)
    # Few have a configuration, and the parser costs more than a short session's start.
    import tomllib  # noqa: PLC0415

    try:
        # Editors of Windows begin a file with a byte order mark.
        return tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise VshError(f"{path}: {error}", status=STATUS) from error


def _read_file(path: str) -> bytes | None:
    fd = -1
    try:
        # The open must not wait for a FIFO's writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == DEV_NULL:
            return None
        _check(path, status)
        return os.read(fd, SIZE_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise VshError(f"cannot read {path}: {error.strerror}", status=STATUS) from error
    finally:
        if fd >= 0:
            os.close(fd)


def _check(path: str, status: os.stat_result) -> None:
    """Raises VshError when others can write to the file: its writer decides where vsh connects to."""
    if not stat.S_ISREG(status.st_mode):
        kind = SPECIAL.get(stat.S_IFMT(status.st_mode), "a special file")
        raise VshError(
            f"{path} is {kind}, not a configuration file",
            hint="VSH_CONFIG names a TOML file; /dev/null stands for no configuration",
            status=STATUS,
        )
    if status.st_uid not in (0, os.geteuid()):
        raise VshError(f"{path} belongs to uid {status.st_uid}, not to you", status=STATUS)
    if status.st_mode & 0o022:
        raise VshError(f"other users can write {path}", hint=f"chmod go-w {path}", status=STATUS)
