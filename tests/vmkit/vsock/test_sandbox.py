"""The device's sandbox: what the filter answers to every system call, what a refusal looks like, and the ceiling."""

import errno
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.vsock.device_process import ROOT, Bench, open_bench
from tests.vmkit.vsock.fake_driver import WAIT_S
from vmkit.vsock import sandbox, syscalls
from vmkit.vsock.link import HEADROOM_BYTES
from vmkit.vsock.muxer import WINDOW_BUDGET_BYTES

ALLOW, TRAP, FAIL = 0x7FFF0000, 0x00030000, 0x00050000 | errno.EACCES
ARCHITECTURES = (syscalls.X86_64, syscalls.AARCH64)


def answer(program: bytes, architecture: int, number: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """What a filter answers: a machine for the few instructions of classic BPF that it uses."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments)
    code = list(struct.iter_unpack("<HBBI", program))
    at = loaded = 0
    while True:
        operation, when_true, when_false, value = code[at]
        at += 1
        match operation:
            case 0x20:
                loaded = struct.unpack_from("<I", data, value)[0]
            case 0x54:
                loaded &= value
            case 0x15:
                at += when_true if loaded == value else when_false
            case 0x35:
                at += when_true if loaded >= value else when_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"an instruction that the filter does not use: {operation:#x}")


HARMFUL = """
execve execveat fork vfork clone clone3 ptrace process_vm_readv process_vm_writev kill tkill tgkill pidfd_send_signal
bind socketpair mount umount2 pivot_root chroot setns unshare bpf perf_event_open userfaultfd io_uring_setup
memfd_create init_module finit_module keyctl add_key setuid setgid setresuid capset prlimit64 setrlimit
seccomp personality unlink unlinkat rename renameat2 link linkat symlinkat mkdirat mknodat truncate ftruncate
fchmod fchown pidfd_getfd open_by_handle_at name_to_handle_at shmat remap_file_pages
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_filter_refuses_what_reaches_beyond_the_process(architecture: int) -> None:
    program = sandbox.plan_filter(architecture)
    numbers = syscalls.number_calls(architecture)
    known = [name for name in HARMFUL.split() if name in numbers]
    assert len(known) > 40
    assert {name: answer(program, architecture, numbers[name]) for name in known} == dict.fromkeys(known, TRAP)
    for name in ("open", "openat", "openat2"):
        if name in numbers:
            assert answer(program, architecture, numbers[name]) == FAIL
    for number in (-1, 1000, 0x40000000 | numbers["read"]):
        assert answer(program, architecture, number) == TRAP


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_filter_refuses_every_call_of_another_architecture(architecture: int) -> None:
    program = sandbox.plan_filter(architecture)
    for other in (*ARCHITECTURES, 0x40000003, 0):
        answers = {answer(program, other, number) for number in range(500)}
        assert (answers == {TRAP}) == (other != architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "argument", "allowed", "refused"),
    [
        ("socket", 0, (socket.AF_UNIX,), (socket.AF_INET, socket.AF_NETLINK, 40, 0, 2**32 - 1)),
        ("mmap", 2, (0, 1, 3), (4, 5, 7)),
        ("mprotect", 2, (0, 1, 3), (4, 7)),
        ("ioctl", 1, (0x541B, 0x5421, 0x5451), (0x5412, 0x5413)),
        ("fcntl", 1, (3, 4, 1030), (8, 10, 1024)),
        ("prctl", 0, (0x53564D41,), (4, 22, 38)),
        ("rt_sigaction", 0, (1, 15), (31,)),
    ],
)
def test_filter_looks_at_arguments(
    architecture: int, name: str, argument: int, allowed: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    program = sandbox.plan_filter(architecture)
    number = syscalls.number_calls(architecture)[name]
    for answers, values in ((ALLOW, allowed), (TRAP, refused)):
        for value in values:
            arguments = tuple(value if index == argument else 2**63 for index in range(6))
            assert answer(program, architecture, number, arguments) == answers, value


def test_filter_by_hand_lets_sockets_be_removed() -> None:
    unlink = syscalls.number_calls(syscalls.X86_64)["unlink"]
    assert answer(sandbox.plan_filter(syscalls.X86_64, is_by_hand=True), syscalls.X86_64, unlink) == ALLOW


@pytest.mark.parametrize(
    ("architecture", "headers"),
    [
        (syscalls.X86_64, ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h")),
        (syscalls.AARCH64, ("asm-generic/unistd.h",)),
    ],
)
def test_tables_agree_with_the_headers_of_this_host(architecture: int, headers: tuple[str, ...]) -> None:
    paths = [path for header in headers if (path := Path("/usr/include") / header).exists()]
    if not paths:
        pytest.skip("this host has no kernel headers")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", paths[0].read_text()))
    numbers = syscalls.number_calls(architecture)
    shared = found.keys() & numbers.keys()
    assert len(shared) > 250
    assert {name: int(found[name]) for name in shared} == {name: numbers[name] for name in shared}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_name_each_number_once(architecture: int) -> None:
    numbers = syscalls.number_calls(architecture)
    assert len(set(numbers.values())) == len(numbers)
    assert syscalls.name_call(architecture, numbers["execve"]) == f"execve ({numbers['execve']})"
    assert syscalls.name_call(architecture, 999) == "unknown (999)"
    assert syscalls.name_call(0x40000003, 11) == "unknown (11)"


# In a real process.

ENTER = """
import ctypes, mmap, os, resource, signal, socket, sys
from vmkit.vsock.notices import Notices
from vmkit.vsock.sandbox import enter_sandbox, limit_memory
notices = Notices("vsock[3] ")
libc = ctypes.CDLL(None)
limit_memory()
enter_sandbox(lambda text: notices.tell("sandbox", text))
"""

REFUSED = {
    "fork": "os.fork()",
    "execve": "os.execv('/bin/true', ['true'])",
    "kill": "os.kill(1, 0)",
    "socket": "socket.socket(socket.AF_INET)",
    "bind": "socket.socket(socket.AF_UNIX).bind('/tmp/x')",
    "unlink": "os.unlink('/nonexistent')",
    "prlimit64": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "mmap": "mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC | mmap.PROT_READ)",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "rt_sigaction": "signal.signal(signal.SIGSYS, signal.SIG_IGN)",
    "memfd_create": "os.memfd_create('x')",
    "setuid": "os.setuid(0)",
    "unknown": "libc.syscall(0x40000000 | 39)",
}


def run_in_sandbox(code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", f"{ENTER}\n{code}\nprint('went on')"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=WAIT_S, check=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_call_ends_the_process_and_is_named(name: str) -> None:
    done = run_in_sandbox(REFUSED[name])
    if name == "fork" and done.returncode == -signal.SIGSYS:
        # glibc 2.41 blocks every signal around clone(). The kernel then ends the process before a handler can name it.
        assert not done.stdout
        return
    assert done.returncode == sandbox.SANDBOX_STATUS
    assert not done.stdout
    # A C library may call by another name: fork is clone, unlink is unlinkat.
    others = {"fork": "(fork|vfork|clone|clone3)", "unlink": "(unlink|unlinkat)"}
    pattern = (
        rf"vsock\[3\] sandbox: the system call {others.get(name, name)} \(\d+\) is not allowed here; it came from "
    )
    assert re.fullmatch(pattern + r"\S+:\d+\n", done.stderr), done.stderr


def test_file_that_is_opened_all_the_same_is_an_error_of_its_opener() -> None:
    done = run_in_sandbox("try:\n    open('/etc/passwd')\nexcept PermissionError:\n    print('no file')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no file\nwent on\n", "")


def test_privileges_and_memory_are_given_up(bench: Bench) -> None:
    bench.settle()
    proc = Path(f"/proc/{bench.process.pid}")
    status = proc.joinpath("status").read_text()
    assert "NoNewPrivs:\t1\n" in status and "Seccomp:\t2\n" in status
    ceiling = resource.prlimit(bench.process.pid, resource.RLIMIT_DATA)
    assert ceiling == (sandbox.MEMORY_CEILING_BYTES,) * 2
    assert WINDOW_BUDGET_BYTES * 9 // 8 + 2**25 < sandbox.MEMORY_CEILING_BYTES


def test_lower_ceiling_of_the_host_stays() -> None:
    code = """
import resource
from vmkit.vsock.sandbox import limit_memory
resource.setrlimit(resource.RLIMIT_DATA, (2**26, 2**30))
limit_memory()
print(resource.getrlimit(resource.RLIMIT_DATA))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"({2**26}, {2**26})\n"


def read_confinement(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if line.startswith(("NoNewPrivs:", "Seccomp:", "Seccomp_filters:"))]


def test_device_runs_without_a_sandbox_where_it_is_told_to() -> None:
    with open_bench("--no-sandbox") as bench:
        bench.driver.boot()
        # A container may have put us in one, too.
        assert read_confinement(bench.process.pid) == read_confinement(os.getpid())
        bench.open_to_guest(9001)


def measure_data_bytes(bench: Bench) -> int:
    status = Path(f"/proc/{bench.process.pid}/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) * 1024


def test_device_without_memory_resets_who_needs_more_and_serves_the_others(bench: Bench) -> None:
    listener = bench.listen(7777)
    guests = [bench.driver.dial(7777) for _ in range(40)]
    bench.wait(lambda: all(guest.is_open for guest in guests))
    other, other_guest = bench.open_to_guest(9001)
    limit_bytes = measure_data_bytes(bench) + HEADROOM_BYTES + 2**20
    resource.prlimit(bench.process.pid, resource.RLIMIT_DATA, (limit_bytes,) * 2)
    for guest in guests:
        guest.send(bytes(2**20))
    bench.wait(lambda: "no-memory" in bench.log())
    bench.wait(lambda: any(guest.is_reset for guest in guests))
    bench.settle()
    # Python takes memory by the MiB: with less left than that, any statement of the device's could fail.
    assert limit_bytes - measure_data_bytes(bench) > 2**20
    other_guest.send(b"alive")
    bench.wait(lambda: other.data == b"alive")
    listener.close()
