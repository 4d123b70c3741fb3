"""The registry's reading side: which machines run here, and how to reach them. Knows vmkit's files, never vmkit's code.

The contract is docs/explanation/architecture.md, "Contracts between rooms". Each machine has a directory below the
runtime directory, with `machine.json` and a `lock` that the machine's monitor holds for life. An entry whose lock is
free is stale, and not a machine. Names that begin with a dot are entries being made or removed.
"""

import os
import stat

from vsh.errors import VshError

MACHINES = "machines"
RECORD = "machine.json"
LOCK = "lock"
TOKEN = "token"  # noqa: S105 - a file's name
# The names of machines that vmkit boots in order to save them begin so.
SAVING = "saving-"
# A record is a few hundred bytes.
MAX_RECORD_BYTES = 64 * 1024


class Entry:
    """One entry of the registry, from its record at one moment. state: starting, ready, paused or stopping."""

    __slots__ = (
        "backend",
        "cid",
        "container",
        "directory",
        "name",
        "pid",
        "record",
        "recordings",
        "state",
        "token_file",
        "vsock",
    )

    def __init__(self, directory: str, record: dict[str, object]) -> None:
        self.directory = directory
        self.record = record
        self.name = str(record["name"])
        self.cid = int(str(record["cid"]))
        self.backend = str(record.get("backend", ""))
        self.state = str(record.get("state", ""))
        self.pid = int(str(record.get("pid", 0)))
        vsock = record.get("vsock")
        self.vsock = str(vsock) if vsock else None
        # The folder into which vsh records its sessions; empty: it records none by itself.
        self.recordings = str(record.get("recordings") or "")
        # What a container image says of its program (vsh.defaults); empty: the root is of none.
        container = record.get("container")
        self.container: dict[str, object] = container if isinstance(container, dict) else {}
        # Where the machine's token is, should it demand one.
        self.token_file = os.path.join(directory, TOKEN) if record.get("token") else ""


def is_for_users(machine: Entry) -> bool:
    """Whether a command without a name may mean this machine: not if it waits in a pool, or is there to be saved."""
    return machine.state != "pooled" and not machine.name.startswith(SAVING)


def find_runtime_directory() -> str:
    """Returns the directory in which machines are registered. It need not exist. When it does, it is the caller's own
    and closed to all other users.

    Raises VshError when the directory belongs to another user, or is open to others: its writer decides where vsh
    connects to.
    """
    path = _choose_runtime_directory()
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return path
    except OSError as error:
        raise VshError(f"cannot look at the runtime directory {path}: {error.strerror}") from error
    hint = "set VMKIT_RUNTIME_DIR to a directory of your own, mode 0700"
    if not stat.S_ISDIR(status.st_mode):
        raise VshError(f"the runtime directory {path} is not a directory", hint=hint)
    if status.st_uid != os.geteuid():
        raise VshError(f"the runtime directory {path} belongs to uid {status.st_uid}, not to you", hint=hint)
    if status.st_mode & 0o077:
        raise VshError(f"other users have access to the runtime directory {path}", hint=f"chmod 700 {path}")
    return path


def read_machines() -> list[Entry]:
    """Returns every live machine, sorted by name."""
    folder = os.path.join(find_runtime_directory(), MACHINES)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VshError(f"cannot read the registry of machines {folder}: {error.strerror}") from error
    found = (_read_machine(os.path.join(folder, name)) for name in names if not name.startswith("."))
    return [machine for machine in found if machine is not None]


def find_machine(name: str | None = None, cid: int | None = None) -> Entry | None:
    """Returns the live machine of that name, or of that CID."""
    for machine in read_machines():
        if name is not None and machine.name == name:
            return machine
        if cid is not None and machine.cid == cid:
            return machine
    return None


def _choose_runtime_directory() -> str:
    environ = os.environ
    chosen = environ.get("VMKIT_RUNTIME_DIR")
    if chosen:
        return os.path.abspath(chosen)
    for base in (environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}"):
        if base and _is_own_directory(base):
            return os.path.join(base, "vmkit")
    return f"/tmp/vmkit-{os.geteuid()}"  # noqa: S108  (its owner and mode are checked)


def describe_detour() -> str:
    """Names the directory that replaces an XDG_RUNTIME_DIR of another user; empty when none replaces it."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base or os.environ.get("VMKIT_RUNTIME_DIR"):
        return ""
    try:
        owner = os.stat(base).st_uid
    except (OSError, ValueError):
        return ""
    if owner == os.geteuid():
        return ""
    return f"XDG_RUNTIME_DIR={base} belongs to uid {owner}; the machines are in {_choose_runtime_directory()}"


def _is_own_directory(path: str) -> bool:
    """Whether the directory belongs to this user. sudo and su often leave XDG_RUNTIME_DIR another user's."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _read_machine(directory: str) -> Entry | None:
    """Returns the machine in a directory; None when it is no entry, is unreadable, or its lock is free."""
    # With what it imports, json is a third of a short command's start; most have no registry to read.
    import json  # noqa: PLC0415

    try:
        if not is_held(os.path.join(directory, LOCK)):
            return None
        with open(os.path.join(directory, RECORD), "rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
        machine = Entry(directory, record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # A copied directory, or a record from another source, is not the machine that it names.
    return machine if machine.name == os.path.basename(directory) else None


def is_held(path: str | os.PathLike[str]) -> bool:
    """True when its owner, such as a machine's monitor, has the lock at `path`.

    The check takes a shared lock, so that many processes can check at once.
    """
    import fcntl  # noqa: PLC0415 - most commands ask no lock

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
