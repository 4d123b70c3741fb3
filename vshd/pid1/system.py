"""The systemd of a root that is not vshd's own as pid 1, in the place of vshd's init.

pid 1 enters the root's mount namespace and executes the root's /sbin/init. Before that it forks, and the child, which
stays in the initramfs, keeps vshd running. So nothing of the root runs in vshd, and vshd waits for nothing that the
root starts.
"""

import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import os

from vshd.oom import NEVER, set_score
from vshd.pid1.duties import DutyError
from vshd.root import Root, find_call, open_namespaces
from vshd.signals import find_ignored

# Which init an image or its user wants: systemd where the root has it, systemd or no start, vshd's own.
AUTO, SYSTEMD, NONE = "auto", "systemd", "none"
WORDS = (AUTO, SYSTEMD, NONE)
# The same on the kernel's command line, where it comes before the image's.
ARGUMENT = "vmkit.init="
# What the host is told with READY.
FACT = b"INIT=systemd\n"

INIT = "/sbin/init"
# SIGRTMIN+4 as the C library counts, which keeps two of the kernel's for itself: systemd starts poweroff.target.
POWER_OFF = 38
# linux/sched.h
CLONE_FS = 0x00000200
# What the kernel gives its init.
ENVIRONMENT = {"HOME": "/", "TERM": "linux"}


def find_wanted(command_line: str, wanted: str) -> str:
    """The word of the kernel's command line, else `wanted`, the image's. Raises DutyError for an unknown one."""
    for word in command_line.split():
        if word.startswith(ARGUMENT):
            wanted = word.removeprefix(ARGUMENT)
    if wanted not in WORDS:
        raise DutyError(f"an init must be one of {', '.join(WORDS)}, not '{wanted}'")
    return wanted


def find_system(wanted: str, namespace: str) -> Root | None:
    """The root whose systemd is to be pid 1; None: vshd's init stays. namespace: of --root_namespace.

    Raises DutyError where the root lacks a systemd that is wanted, OSError.
    """
    if wanted == NONE or not namespace:
        return None
    root = open_namespaces(namespace)
    # The kernel shares its own working directory and root with pid 1. With shared ones no process enters a namespace.
    find_call("unshare")(CLONE_FS)
    root.enter()
    try:
        target = os.path.realpath(INIT)
        is_there = os.path.basename(target) == SYSTEMD and os.access(target, os.X_OK)
        is_known = os.path.exists(target)
    finally:
        root.leave()
    if is_there:
        return root
    if wanted == SYSTEMD:
        raise DutyError(f"the root has no systemd: its {INIT} is {target if is_known else 'missing'}")
    return None


def become_system(root: Root) -> None:
    """Executes the root's systemd. Returns never. Raises DutyError where that fails, in vshd's own root again."""
    root.enter()
    for number in find_ignored():
        _signal.signal(number, _signal.SIG_DFL)
    # A request to power off waits until systemd takes signals. The kernel would drop it.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (POWER_OFF,))
    try:
        os.execve(INIT, [INIT], ENVIRONMENT)  # noqa: S606 - pid 1 becomes it
    except OSError as error:
        root.leave()
        raise DutyError(f"cannot run the root's {INIT}: {error.strerror}") from error


def spare_keeper() -> None:
    """Has the kernel never end this process for want of memory. vshd would not be started again."""
    set_score("self", NEVER)


def expose_vshd() -> None:
    """Gives a child of the keeper the score that vshd's commands inherit."""
    set_score("self", 0)
