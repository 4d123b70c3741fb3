"""The keys of a machine's name: a key pair for its users, and a host key for its guests, in a folder of the name's own.

They are below the state folder and outlive the machine. Each file appears whole or not at all, and one process at a
time makes, renews or removes them.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vmkit.errors import CommandError, HostError
from vmkit.machine.registry import find_state_directory
from vmkit.machine.spec import check_name
from vmkit.run import run
from vmkit.ssh.mark import KEY

# Below the state folder. No machine's name begins with a dot, and the folders beside it are machines' logs.
KEYS = ".ssh"
HOST_KEY, LOCK = "host_key", "lock"
_KEYGEN_TIMEOUT_S = 30.0
# Another ssh may be exchanging keys with the same guest.
LOCK_DEADLINE_S = 120.0
# Of a folder that several processes remove at once.
REMOVAL_DEADLINE_S, REMOVAL_POLL_S = 2.0, 0.005
_LOCK_POLL_S = 0.02


def find_folder(name: str) -> Path:
    """Returns the folder for the keys of that name, even when it is missing. Raises ConfigError for a wrong name."""
    return find_state_directory() / KEYS / check_name(name)


@contextlib.contextmanager
def hold_folder(folder: Path, *, deadline_s: float = LOCK_DEADLINE_S) -> Iterator[None]:
    """Makes the folder if needed, and locks it for this process alone.

    Raises HostError at the deadline, and for a folder that is open to others.
    """
    end_s = time.monotonic() + deadline_s
    while True:
        try:
            _make_folder(folder)
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError as error:
            # The keys were removed in between.
            if time.monotonic() > end_s:
                raise HostError(f"cannot make the folder {folder}: {error.strerror}") from error
            continue
        except OSError as error:
            raise HostError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            _lock(fd, folder / LOCK, end_s)
            if _is_same(fd, folder / LOCK):
                yield
                return
        finally:
            os.close(fd)


def make_keys(folder: Path, name: str) -> None:
    """Makes the missing and damaged keys anew. The caller holds the folder. Raises HostError, CommandError."""
    try:
        for key in (KEY, HOST_KEY):
            if not _is_sound(folder / key):
                _make_key(folder / key, f"vmkit {name}")
    except OSError as error:
        raise HostError(
            f"cannot write to {folder}: {error.strerror}", hint=f"vmkit ssh --forget-keys {name}"
        ) from error


def remove_keys(folder: Path) -> bool:
    """Removes all keys of a name. False: there were none. Raises HostError."""
    if not os.path.lexists(folder):
        _remove_set_aside(folder)
        return False
    with hold_folder(folder):
        try:
            # At once: another process may make a lock in the folder while its files are removed one by one.
            folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}"))
        except OSError as error:
            raise HostError(f"cannot remove the keys in {folder}: {error.strerror}") from error
    _remove_set_aside(folder)
    return True


def write_file(path: Path, text: str) -> None:
    """Writes the text to a file of mode 0600. A reader sees the old file or the new one. An equal file stays."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == text and stat.S_IMODE(path.stat().st_mode) == 0o600:
            return
    new = path.with_name(f".{path.name}")
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise HostError(f"cannot write {path}: {error.strerror}") from error


def _remove_set_aside(folder: Path) -> None:
    """Removes what remove_keys() has set aside, also that of a process that was killed. Raises HostError."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        end_s = time.monotonic() + REMOVAL_DEADLINE_S
        while True:
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            # Another process may be removing the same folder: then its last file goes in a moment.
            if time.monotonic() > end_s:
                raise HostError(f"cannot remove the keys in {path}")
            time.sleep(REMOVAL_POLL_S)


def _make_folder(folder: Path) -> None:
    """Makes the folder. Raises FileNotFoundError when another process removes it meanwhile.

    Raises HostError unless it is the caller's own and closed to others: its keys open guests.
    """
    folders = (folder.parent, folder) if folder.parent.name == KEYS else (folder,)
    try:
        folders[0].parent.mkdir(parents=True, exist_ok=True)
        for path in folders:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                hint = f"chmod 700 {path}, or remove it"
                raise HostError(f"{path} must be a folder of your own with mode 0700: it holds ssh keys", hint=hint)
    except FileNotFoundError:
        # Another process has removed it.
        raise
    except OSError as error:
        raise HostError(f"cannot make the folder {folder}: {error.strerror}") from error


def _lock(fd: int, path: Path, end_s: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                brief = f"another vmkit still holds {path}"
                raise HostError(brief, hint=f"find it, and end it if it hangs: fuser -v {path}") from None
        # flock(2) has no deadline of its own.
        time.sleep(_LOCK_POLL_S)


def _is_same(fd: int, path: Path) -> bool:
    """False when the lock's file was removed while this process waited for it."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _is_sound(path: Path) -> bool:
    """Whether the private key opens without a passphrase, and matches the public key beside it."""
    public = path.with_suffix(".pub")
    try:
        # ssh refuses a private key that others can read.
        path.chmod(0o600)
        kept = public.read_bytes().split()[:2]
        found = run(["ssh-keygen", "-y", "-P", "", "-f", path], timeout_s=_KEYGEN_TIMEOUT_S, package="openssh-client")
    except (FileNotFoundError, CommandError):
        return False
    return len(kept) == 2 and found.split()[:2] == kept


def _make_key(path: Path, comment: str) -> None:
    new = path.with_name(f".{path.name}")
    public, new_public = path.with_suffix(".pub"), new.with_name(f"{new.name}.pub")
    for old in (path, public, new, new_public):
        old.unlink(missing_ok=True)
    argv: list[str | Path] = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", new]
    run(argv, timeout_s=_KEYGEN_TIMEOUT_S, package="openssh-client")
    new_public.replace(public)
    new.replace(path)
