"""Whether this host has a virtiofsd that can serve a folder as a guest's root, and if not, why. Starts no server.

virtiofsd keeps a descriptor open for each file that the guest remembers. When it may open no more, the guest cannot
open its own C library any more. So it is used only where that cannot happen. The C program of QEMU 7 and earlier runs
as root alone, and lets the guest write: it is never used.
"""

import functools
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import VmkitError
from vmkit.machine.programs import render_environment
from vmkit.run import run

NAME = "virtiofsd"
# Where distributions have it; few have it on PATH.
PLACES: tuple[str, ...] = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
# In its --help. The C program lacks most of them.
NEEDED_OPTIONS = (
    *("--shared-dir", "--fd", "--sandbox", "--readonly", "--rlimit-nofile"),
    *("--translate-uid", "--translate-gid", "--no-announce-submounts"),
)
DEADLINE_S = 10.0
# A file that a guest remembers takes at least 1 KiB of its memory: struct fuse_inode and a dentry.
FILES_PER_MIB = 1024
# What a guest cannot remember files in: its kernel and its initramfs are larger.
GUEST_OWN_MIB = 16
# A folder with more entries is not counted to its end. That takes a third of a second; a slow disk has its deadline.
MAX_COUNTED = 50_000
COUNT_DEADLINE_S = 3.0
# What the program keeps for itself: it reserves 610, and ends at once under a lower limit.
OWN_FILES = 1024
# Of a limit that is none.
MAX_OPEN_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """program: empty where none can be used. trouble says why then, and hint what to do. open_files: its limit."""

    program: str = ""
    open_files: int = 0
    trouble: str = ""
    hint: str = ""


def find_virtiofsd(folder: Path, memory_mib: int) -> Virtiofsd:
    """The program that can serve `folder` to a guest with so much memory."""
    found = _find(folder, memory_mib)
    if not found.program or _has_namespaces(is_view=is_host_root(folder)):
        return found
    return Virtiofsd(trouble="this host gives virtiofsd no namespaces for its sandbox")


def find_sharing_virtiofsd(folder: Path, memory_mib: int) -> Virtiofsd:
    """The same for a share, where the program's own start shows whether this host gives it a sandbox."""
    if is_host_root(folder):
        # pivot_root(2) refuses it there (EBUSY; version 1.13.2).
        return Virtiofsd(trouble="virtiofsd cannot make its sandbox of / itself")
    return _find(folder, memory_mib)


def is_host_root(folder: Path) -> bool:
    """Whether it is / itself. A bind mount of / elsewhere is not: it need not have what is mounted below."""
    return os.path.realpath(folder).strip("/") == ""


def plan_view(folder: Path, argv: Sequence[str]) -> tuple[str, ...]:
    """argv for a program that has / of this host at a folder."""
    return (sys.executable, "-P", "-m", "vmkit.machine.host_view", str(folder), *argv)


def _find(folder: Path, memory_mib: int) -> Virtiofsd:
    found = (shutil.which(NAME), *PLACES)
    program = next((path for path in found if path and os.access(path, os.X_OK)), None)
    if program is None:
        return Virtiofsd(trouble="virtiofsd is not installed", hint="install it: sudo apt-get install virtiofsd")
    return _examine(program, folder, memory_mib, find_limit())


def find_limit() -> int:
    """How many files a program of this user may open, if it asks for all that it may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)


# A start asks before it reads the kernel's options, and once more when the image is there.
@functools.lru_cache(maxsize=8)
def _examine(program: str, folder: Path, memory_mib: int, limit: int) -> Virtiofsd:
    try:
        text = run([program, "--help"], timeout_s=DEADLINE_S).decode(errors="replace")
    except VmkitError as error:
        return Virtiofsd(trouble=f"{program} does not run: {error.brief}")
    if not all(option in text for option in NEEDED_OPTIONS):
        return Virtiofsd(
            trouble=f"{program} cannot serve a folder that the guest only reads",
            hint="install one with --readonly, as Debian 13 has it",
        )
    needed = max(0, memory_mib - GUEST_OWN_MIB) * FILES_PER_MIB
    usable = limit - OWN_FILES
    # Twice, for a folder that grows, and for files that are open.
    most = min(usable // 2, MAX_COUNTED)
    if usable < needed and not (usable > 0 and has_few_entries(folder, most, _list_covered(folder))):
        return Virtiofsd(
            trouble=f"virtiofsd may open {limit} files, and a guest with {memory_mib} MiB can remember {needed}",
            hint=f"raise the limit (ulimit -Hn) to {needed + OWN_FILES}",
        )
    return Virtiofsd(program, limit)


def _has_namespaces(*, is_view: bool) -> bool:
    """Whether a program gets the namespaces that virtiofsd makes for itself. is_view: also where it has / at a folder.

    It makes them of its user's own in either case, so that the trial is the same.
    """
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    trial = ("unshare", *user, "--mount", "--pid", "--net", "--fork", "--mount-proc", "true")
    try:
        with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
            words = plan_view(Path(folder), trial) if is_view else trial
            run(words, timeout_s=DEADLINE_S, env=render_environment(os.environ))
    except (VmkitError, OSError):
        return False
    return True


def _list_covered(folder: Path) -> frozenset[str]:
    """What of a folder virtiofsd does not have."""
    if not is_host_root(folder):
        return frozenset()
    from vmkit.machine.host_view import COVERED  # noqa: PLC0415 - most machines have no such root

    return frozenset(os.path.join(folder, name) for name in COVERED)  # noqa: PTH118 - as os.scandir has them


def has_few_entries(folder: Path, most: int, skipped: Container[str] = ()) -> bool:
    """Whether a folder has at most so many entries, with all below it but what is below `skipped`.

    Follows no symlink. A folder that takes longer has many.
    """
    end_s = time.monotonic() + COUNT_DEADLINE_S
    count, left = 0, [os.fspath(folder)]
    while left:
        if time.monotonic() > end_s:
            return False
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > most:
                        return False
                    if entry.is_dir(follow_symlinks=False) and entry.path not in skipped:
                        left.append(entry.path)
        except OSError:
            # virtiofsd runs as this user, and cannot open it either.
            continue
    return True
