"""The user's own folders: checks that others cannot write to them, and finds those of the state and of the data.

Neither can be made again. The state folder holds logs of machines that ended, and trust; the data folder holds machines
that stay.
"""

import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path

from vmkit.errors import HostError

# The kernel gives the first PID namespace this inode number (PROC_PID_INIT_INO).
INITIAL_PID_NAMESPACE = 0xEFFFFFFC


def find_state_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """$VMKIT_STATE_DIR, else $XDG_STATE_HOME/vmkit, else ~/.local/state/vmkit; None for a user without a home.

    Raises HostError for a folder that others can write to.
    """
    folder = _choose_state_folder(environ)
    if folder is not None:
        check_own_folder(folder, "state", "VMKIT_STATE_DIR")
    return folder


def check_own_folder(folder: Path, name: str, variable: str) -> None:
    """Raises HostError when another user owns `folder`, or can write to it or replace it.

    Such a user could change what vmkit trusts, or make it follow a link. For a missing folder it checks the folders
    above. name: the folder's name for the error. variable: the environment variable that names another folder.
    """
    try:
        real = folder.resolve()
        status = _stat(real)
        open_folders = [] if status is None or not _is_writable_by_others(status) else [real]
        if status is not None and status.st_uid != os.geteuid():
            raise HostError(
                f"the {name} folder {folder} belongs to another user (uid {status.st_uid})",
                hint=f"name one of your own: {variable}=DIR",
            )
        if not _is_root_of_container():
            open_folders += [parent for parent in _list_parents(real) if _is_replaceable_in(parent)]
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "its symbolic links form a loop"
        raise HostError(
            f"cannot read the {name} folder {folder}: {reason}", hint=f"name another: {variable}=DIR"
        ) from error
    if open_folders:
        found = open_folders[0].stat()
        what = (
            f"the {name} folder {folder}" if open_folders[0] == real else f"{open_folders[0]}, above the {name} folder"
        )
        remedy = f"if you trust what is in it: chmod go-w {shlex.join(map(str, open_folders))}; or "
        raise HostError(
            f"other users can write to {what} (mode {stat.S_IMODE(found.st_mode):04o}, uid {found.st_uid})",
            hint=f"{remedy if all(map(_has_trusted_owner, open_folders)) else ''}name another: {variable}=DIR",
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _list_parents(folder: Path) -> list[Path]:
    """Returns the folders above, up to the user's home, or to the root for a folder outside it."""
    parents = list(folder.parents)
    try:
        home = Path.home().resolve()
    except RuntimeError:
        return parents
    return parents[: parents.index(home) + 1] if home in parents else parents


def _is_replaceable_in(parent: Path) -> bool:
    """Whether other users can rename and remove files of a folder. The sticky bit prevents that, as in /tmp."""
    status = _stat(parent)
    if status is None:
        return False
    if not _has_trusted_owner(parent):
        return True
    return _is_writable_by_others(status) and not status.st_mode & stat.S_ISVTX


def _has_trusted_owner(folder: Path) -> bool:
    """Whether root, this user or the owner of / owns it. The owner of / rules every path, and may not be uid 0."""
    return folder.stat().st_uid in (0, os.geteuid(), Path("/").stat().st_uid)


def _is_writable_by_others(status: os.stat_result) -> bool:
    mode = status.st_mode
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_own_group(status.st_gid)))


def _is_root_of_container() -> bool:
    """Whether this is root with a PID namespace of its own. There, CI systems make folders writable for all users."""
    return os.geteuid() == 0 and Path("/proc/self/ns/pid").stat().st_ino != INITIAL_PID_NAMESPACE


def _is_own_group(gid: int) -> bool:
    """Whether a group is this user's alone, as Debian makes one for each: such folders are writable with umask 002."""
    import grp  # noqa: PLC0415 - few folders ask for it
    import pwd  # noqa: PLC0415

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def find_data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$VMKIT_DATA_DIR, else $XDG_DATA_HOME/vmkit, else ~/.local/share/vmkit. Its caller checks it.

    Raises HostError for a user without a home.
    """
    folder = _choose_folder(environ, "VMKIT_DATA_DIR", "XDG_DATA_HOME", ".local/share")
    if folder is None:
        raise HostError(
            "there is no home directory to keep machines in", hint="set HOME, or VMKIT_DATA_DIR to a folder of your own"
        )
    return folder


def _choose_state_folder(environ: Mapping[str, str]) -> Path | None:
    return _choose_folder(environ, "VMKIT_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def _choose_folder(environ: Mapping[str, str], variable: str, xdg: str, below_home: str) -> Path | None:
    named = environ.get(variable)
    if named:
        # A monitor's working directory is not ours.
        return Path(named).absolute()
    base = environ.get(xdg, "")
    if base.startswith("/"):
        return Path(base) / "vmkit"
    try:
        return Path.home() / below_home / "vmkit"
    except RuntimeError:
        return None
