"""Tries to reach vshd from a session in a root of its user's, and prints what it found, as JSON.

Runs in the guest (tests/guest/test_root_attacks.py), as a user, as root of a user namespace and as root. `vshd` in a
command line tells which processes are vshd's: everybody may read that.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
# On x86-64 (asm/unistd_64.h).
PTRACE, SETNS, PROCESS_VM_READV, PIDFD_GETFD = 101, 308, 310, 438
CLONE_NEWNS = 0x20000
# Of a process: links, folders and files that only those may open who may trace it.
LINKS = ("root", "cwd", "exe", "ns/mnt")
FOLDERS = ("fd", "map_files", "root/etc", "cwd/.")
FILES = ("environ", "maps", "mem", "auxv", "syscall")
# The token is in the firmware's strings; the others have all of the guest's memory.
SECRETS = ("/sys/firmware/dmi/tables/DMI", "/sys/firmware/dmi/entries/11-0/raw", "/dev/mem", "/proc/kcore")


def call(number: int, *words: int) -> int:
    """The result of a system call, whose words are whole registers. Raises OSError."""
    result = int(LIBC.syscall(*(ctypes.c_long(word) for word in (number, *words))))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempt(what: Callable[[], object]) -> str:
    try:
        what()
    except PermissionError:
        return "denied"
    except ProcessLookupError:
        return "gone"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"error {error.errno}"
    return "reached"


def find_daemons() -> list[int]:
    """The processes of vshd: pid 1, the one that listens, and those of sessions."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if b"vshd" in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


def is_others(pid: int) -> bool:
    """Whether a process is there, and not of this one's user, who may signal those."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return f"\nUid:\t{os.getuid()}\t" not in file.read()
    except OSError:
        # A session of the test before has ended meanwhile.
        return False


def read_start(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(64)


def trace(pid: int) -> None:
    call(PTRACE, PTRACE_ATTACH, pid, 0, 0)
    os.waitpid(pid, 0)
    call(PTRACE, PTRACE_DETACH, pid, 0, 0)


def read_memory(pid: int) -> None:
    """Asks for one byte: the kernel checks who asks before it looks at the address."""
    byte = ctypes.create_string_buffer(1)
    # A struct iovec each: address, length (sys/uio.h).
    here, there = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1), (ctypes.c_size_t * 2)(1 << 16, 1)
    call(PROCESS_VM_READV, pid, ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)


def take_descriptor(pid: int) -> None:
    process = os.pidfd_open(pid)
    os.close(call(PIDFD_GETFD, process, 0, 0))


def enter(pid: int) -> None:
    """In a child: who has entered is in no root any more."""
    process = os.pidfd_open(pid)
    child = os.fork()
    if not child:
        try:
            call(SETNS, process, CLONE_NEWNS)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise PermissionError


def attack(pid: int) -> dict[str, str]:
    """What a process of vshd lets this one do."""
    at = f"/proc/{pid}"
    found = {name: attempt(partial(os.readlink, f"{at}/{name}")) for name in LINKS}
    found |= {name: attempt(partial(os.listdir, f"{at}/{name}")) for name in FOLDERS}
    found |= {name: attempt(partial(read_start, f"{at}/{name}")) for name in FILES}
    for act in (read_memory, take_descriptor, enter):
        found[act.__name__] = attempt(partial(act, pid))
    if os.getuid() and is_others(pid):
        # As root this would stop it.
        found["signal"] = attempt(partial(os.kill, pid, signal.SIGSTOP))
    if pid != 1 and pid != os.getppid():
        found["trace"] = attempt(partial(trace, pid))
    return found


def main() -> None:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            # That of the listing.
            continue
    daemons = find_daemons()
    with open("/proc/self/mountinfo") as mounts, open("/proc/cmdline") as words, open("/proc/net/unix") as sockets:
        report = {
            "environment": sorted(os.environ),
            "descriptors": descriptors,
            "mounts": mounts.read(),
            "kernel": words.read(),
            "sockets": sockets.read(),
            "daemons": {pid: attack(pid) for pid in daemons},
            "secrets": {path: attempt(partial(read_start, path)) for path in SECRETS},
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
