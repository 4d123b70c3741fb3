"""virtiofsd's filter: what it answers to each system call, and that the kernel takes it."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.vsock.test_sandbox import answer
from tests.vsh.live import CHECKOUT
from vmkit.shares.filter import has_filter, plan_filter
from vmkit.vsock import syscalls

ALLOW, FAIL = 0x7FFF0000, 0x00050000
REFUSED, UNKNOWN = FAIL | errno.EPERM, FAIL | errno.ENOSYS
SET_ID = (0o4755, 0o2755, 0o6000, 0o104755)
PLAIN = (0o755, 0o1777, 0o100644)
# O_WRONLY | O_CREAT, and O_TMPFILE | O_RDWR as linux/fcntl.h has them on both processors.
MAKING = (0o101, 0o20200002)
# By call: the arguments before the mode.
BEFORE = {"chmod": (0,), "fchmod": (0,), "fchmodat": (0, 0), "fchmodat2": (0, 0), "creat": (0,)}


def ask(architecture: int, name: str, *arguments: int) -> int:
    number = syscalls.number_calls(architecture)[name]
    return answer(plan_filter(architecture), architecture, number, (*arguments, *[0] * (6 - len(arguments))))


@pytest.mark.parametrize("architecture", [syscalls.X86_64, syscalls.AARCH64])
def test_modes_of_other_users_programs_are_refused(architecture: int) -> None:
    known = syscalls.number_calls(architecture)
    for name, before in BEFORE.items():
        if name in known:
            assert {ask(architecture, name, *before, mode) for mode in SET_ID} == {REFUSED}, name
            assert {ask(architecture, name, *before, mode) for mode in PLAIN} == {ALLOW}, name
    for flags in MAKING:
        assert {ask(architecture, "openat", 0, 0, flags, mode) for mode in SET_ID} == {REFUSED}
        assert {ask(architecture, "openat", 0, 0, flags, mode) for mode in PLAIN} == {ALLOW}
    # Without such a flag nothing is made, and the argument may be anything.
    assert ask(architecture, "openat", 0, 0, os.O_RDWR | os.O_DIRECTORY, 0o4755) == ALLOW
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        assert ask(architecture, "mknodat", 0, 0, kind | 0o644) == REFUSED
    for kind in (0, stat.S_IFREG):
        assert ask(architecture, "mknodat", 0, 0, kind | 0o644) == ALLOW
        assert ask(architecture, "mknodat", 0, 0, kind | 0o4644) == REFUSED
    for name in ("bind", "setxattr", "fsetxattr", "lsetxattr"):
        assert ask(architecture, name) == REFUSED
    for name in ("openat2", "io_uring_setup"):
        assert ask(architecture, name) == UNKNOWN
    for name in ("read", "write", "mkdirat", "symlinkat", "linkat", "renameat2", "unshare", "mount", "pivot_root"):
        assert ask(architecture, name) == ALLOW


def test_calls_of_other_tables_are_refused() -> None:
    program = plan_filter(syscalls.X86_64)
    chmod = syscalls.number_calls(syscalls.X86_64)["chmod"]
    assert answer(program, 0x40000003, 15, (0, 0o755, 0, 0, 0, 0)) == REFUSED
    assert answer(program, syscalls.X86_64, chmod | 0x40000000, (0, 0o755, 0, 0, 0, 0)) == REFUSED


ATTACK = """
import ctypes, json, os, socket, stat
from vmkit.shares.filter import enter_filter, plan_filter
enter_filter(plan_filter())
found = {}
def attempt(name, act):
    try:
        act()
        found[name] = 0
    except OSError as error:
        found[name] = error.errno
def make(flags, mode):
    os.close(os.open("made", os.O_CREAT | os.O_EXCL | os.O_WRONLY | flags, mode))
attempt("plain", lambda: make(0, 0o755))
attempt("chmod", lambda: os.chmod("made", 0o4755))
fd = os.open("made", os.O_RDONLY)
attempt("fchmod", lambda: os.fchmod(fd, 0o2755))
attempt("fine", lambda: os.fchmod(fd, 0o1700))
os.unlink("made")
attempt("create", lambda: make(0, 0o6755))
attempt("node", lambda: os.mknod("made", stat.S_IFREG | 0o4755))
attempt("fifo", lambda: os.mkfifo("made"))
attempt("socket", lambda: socket.socket(socket.AF_UNIX).bind("made"))
attempt("folder", lambda: os.mkdir("folder", 0o6755))
print(json.dumps(found))
"""


@pytest.mark.process
def test_kernel_holds_a_program_to_it(tmp_path: Path) -> None:
    assert has_filter()
    words = [sys.executable, "-c", ATTACK]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE, check=True
    )
    refused = dict.fromkeys(("chmod", "fchmod", "create", "node", "fifo", "socket"), errno.EPERM)
    assert json.loads(done.stdout) == {"plain": 0, "fine": 0, "folder": 0, **refused}
    assert os.listdir(tmp_path) == ["folder"]
    assert (tmp_path / "folder").stat().st_mode & 0o6000 == 0
