"""The runtime directory, and the registry's lock in it.

Every folder of entries is below it: machines, forwards. Only one program at a time chooses names and sweeps.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from vmkit.errors import HostError
from vsh.registry import MACHINES, find_runtime_directory

REGISTRY_LOCK = "registry.lock"
# It is held for milliseconds; a process that was stopped while it held it must not stop all others.
REGISTRY_DEADLINE_S = 10.0
REGISTRY_POLL_S = 0.005


def open_runtime_directory() -> Path:
    """Returns the runtime directory, made when it is missing. Raises VshError when it belongs to another user."""
    path = Path(find_runtime_directory())
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Looked at again before anything is made in it: between the first look and mkdir another user may have put a
        # directory there, or a link to one of ours.
        find_runtime_directory()
        (path / MACHINES).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make the runtime directory {path}: {error.strerror}",
            hint="set VMKIT_RUNTIME_DIR to a directory of your own",
        ) from error
    return path


@contextlib.contextmanager
def hold_registry(root: Path) -> Iterator[None]:
    """Excludes every other program that chooses a name or sweeps. Raises HostError after REGISTRY_DEADLINE_S."""
    with explain_errors(root):
        fd = os.open(root / REGISTRY_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_within(fd, root / REGISTRY_LOCK, REGISTRY_DEADLINE_S)
        yield
    finally:
        os.close(fd)


def lock_within(fd: int, path: Path, deadline_s: float) -> None:
    """Locks as flock(2) does, with a deadline, which flock(2) lacks. Raises HostError at the deadline."""
    end_s = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise HostError(
                    f"another vmkit has held {path} for {deadline_s:g} s",
                    hint="look for a stopped one (Ctrl-Z): jobs, ps",
                ) from None
            time.sleep(REGISTRY_POLL_S)
        else:
            return


@contextlib.contextmanager
def explain_errors(root: Path) -> Iterator[None]:
    """Turns an OSError of the block into a HostError with the remedy."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write to the runtime directory {root}: {error.strerror}",
            details=str(error.filename or ""),
            hint="make room there, or set VMKIT_RUNTIME_DIR to another directory of your own",
        ) from error
