"""This host's own files as a folder, for one program: `python -m vmkit.machine.host_view FOLDER PROGRAM WORD...`.

virtiofsd makes its root of the folder that it serves, by pivot_root(2). The kernel refuses that for / itself (EBUSY).
So this program makes a mount namespace, binds / at FOLDER there with all that is mounted below it, and becomes PROGRAM.
PROGRAM alone sees these mounts, and they are gone with it.

Empty folders lie over those of COVERED: a guest has its own, and those of this host are of its processes. A guest that
mounts the export once more finds nothing there.
"""

import ctypes
import os
import stat
import sys
from typing import Final

from vshd.carry.inherited import settle_signals

COVERED: Final = ("dev", "proc", "run", "sys", "tmp")
# linux/sched.h.
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
# linux/mount.h.
_RDONLY: Final = 1
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_BIND: Final = 1 << 12
_REC: Final = 1 << 14
_SLAVE: Final = 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> str:
    """Becomes the program. Returns why that cannot be."""
    settle_signals()
    folder, *argv = sys.argv[1:]
    try:
        enter_namespace()
        bind_root(folder)
        os.execvp(argv[0], argv)  # noqa: S606 - the argv is a plan's
    except OSError as error:
        return f"cannot show / at {folder} to {argv[0]}: {error}"


def enter_namespace() -> None:
    """A mount namespace of our own, and of a user also the user namespace that this takes. Raises OSError.

    The user keeps its number, and has no capability once it becomes another program.
    """
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER) != 0:
        raise _explain("unshare")
    if uid != 0:
        # user_namespaces(7): without the first, a user may not write the last.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "wb") as file:  # noqa: PTH123 - pathlib takes longer to start
                file.write(text.encode())
    # What this host mounts or unmounts later, it does here as well: no unmounted disk stays busy. Not the other way.
    _mount("none", "/", "", _SLAVE | _REC)


def bind_root(folder: str) -> None:
    """Binds / at a folder of this namespace, and covers what is of this host's processes. Raises OSError."""
    _mount("/", folder, "", _BIND | _REC)
    for name in COVERED:
        place = f"{folder}/{name}"
        try:
            is_folder = stat.S_ISDIR(os.lstat(place).st_mode)
        except FileNotFoundError:
            continue
        if is_folder:
            _mount("none", place, "tmpfs", _RDONLY | _NOSUID_NODEV_NOEXEC)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    """mount(2). Raises OSError."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), None)
    if _libc.mount(*words) != 0:
        raise _explain(target)


def _explain(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    sys.exit(main())
