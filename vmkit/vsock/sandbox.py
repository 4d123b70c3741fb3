"""Limits the device process to its work once its sockets are open.

A guest that exploits a fault in the device would be in a process of the user who started the machine. So the process
gives up three things before it reads the front-end's first message: all privileges to come (no_new_privs), every system
call that its work does not need (seccomp), and memory beyond a ceiling. It needs no file, no program, no network and no
other process. It works with the descriptors it was given, and with UNIX sockets that it connects.

A refused call ends the process with SANDBOX_STATUS, and one line of the log names the call and the place in the code.
Only opening a file fails with EACCES instead: the C library and Python try that where they can do without, and handle
the failure.

Specification: linux/seccomp.h, linux/filter.h and seccomp(2); Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vmkit.vsock.syscalls import ARCHITECTURES, X86_64, name_call, number_calls

# EX_NOPERM, sysexits.h.
SANDBOX_STATUS: Final = 77

# Memory of the process's own; the guest's RAM is shared and does not count (RLIMIT_DATA). A net under faults, not a
# limit that a guest may reach: 10 MiB without a guest, 64 of windows, an eighth of these for buffers that grow, 5 of
# traces.
MEMORY_CEILING_BYTES: Final = 128 * 1024 * 1024


class ArgumentCheck(NamedTuple):
    """A condition on one argument: with the mask applied, it must be one of `values`, or none if is_forbidden."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    is_forbidden: bool = False


# The work: packets and bytes, accepting and dialling, waiting. Those of each packet come first.
_WORK: Final = (
    "recvmsg sendmsg recvfrom sendto read write epoll_wait epoll_pwait epoll_ctl readv writev accept accept4 connect"
    " shutdown listen close getsockopt setsockopt getsockname getpeername"
    " select pselect6 poll ppoll"  # before a line is written to stderr
)
# The guest's memory and Python's own. fstat has three names in C libraries; none of them opens anything.
_MEMORY: Final = "brk munmap mremap madvise fstat newfstatat statx"
# What Python, the C library and the kernel do by themselves: time without vDSO, locks, signals, the end.
_RUNTIME: Final = (
    "clock_gettime gettimeofday time clock_nanosleep nanosleep futex sched_yield sched_getaffinity getrandom getpid"
    " gettid rt_sigreturn rt_sigprocmask sigaltstack restart_syscall rseq uretprobe exit exit_group"
)
# A device that was started by hand removes its sockets at the end.
_BY_HAND: Final = "unlink unlinkat lstat"

_AF_UNIX: Final = 1
_PROT_EXEC: Final = 4
# asm-generic/ioctls.h: FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
_IOCTLS: Final = (0x541B, 0x5421, 0x5450, 0x5451)
# fcntl.h: F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC.
_FCNTLS: Final = (1, 2, 3, 4, 1030)
# PR_SET_VMA, linux/prctl.h: names for mappings, which new allocators give.
_PR_SET_VMA: Final = 0x53564D41

_CHECKED: Final = {
    "socket": ArgumentCheck(0, (_AF_UNIX,)),
    "mmap": ArgumentCheck(2, (0,), mask=_PROT_EXEC),
    "mprotect": ArgumentCheck(2, (0,), mask=_PROT_EXEC),
    "ioctl": ArgumentCheck(1, _IOCTLS),
    "fcntl": ArgumentCheck(1, _FCNTLS),
    "prctl": ArgumentCheck(0, (_PR_SET_VMA,)),
    # The handler that names a refused call stays.
    "rt_sigaction": ArgumentCheck(0, (signal.SIGSYS,), is_forbidden=True),
}
_FAILING: Final = "open openat openat2 readlink readlinkat access faccessat faccessat2 getcwd"

# linux/bpf_common.h: load an absolute word; AND; jump if equal, if greater or equal; return.
_LOAD: Final = 0x20
_AND: Final = 0x54
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_EQUAL: Final = 0x35
_RETURN: Final = 0x06
# linux/seccomp.h: struct seccomp_data, and what a filter may answer.
_AT_NUMBER: Final = 0
_AT_ARCHITECTURE: Final = 4
_AT_ARGUMENTS: Final = 16
_TRAP: Final = 0x00030000
_FAIL: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000
# __X32_SYSCALL_BIT, asm/unistd.h: another table of calls under the same architecture.
_X32_BIT: Final = 0x40000000

_Instruction = tuple[int, int, int, int]


def plan_filter(architecture: int, *, is_by_hand: bool = False) -> bytes:
    """Returns the program that the kernel runs at each system call, as an array of struct sock_filter."""
    numbers = number_calls(architecture)
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        *_answer_if(_JUMP_EQUAL, architecture, _TRAP, is_reversed=True),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if architecture == X86_64:
        code += _answer_if(_JUMP_GREATER_EQUAL, _X32_BIT, _TRAP)
    for number in _find_numbers(numbers, f"{_WORK} {_MEMORY} {_RUNTIME} {_BY_HAND if is_by_hand else ''}"):
        code += _answer_if(_JUMP_EQUAL, number, _ALLOW)
    for name, check in _CHECKED.items():
        block = _plan_check(check)
        code += [(_JUMP_EQUAL, 0, len(block), numbers[name]), *block]
    for number in _find_numbers(numbers, _FAILING):
        code += _answer_if(_JUMP_EQUAL, number, _FAIL | errno.EACCES)
    code.append((_RETURN, 0, 0, _TRAP))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _find_numbers(numbers: dict[str, int], names: str) -> Iterator[int]:
    """Yields the numbers of those names that the architecture has."""
    return (numbers[name] for name in names.split() if name in numbers)


def _answer_if(jump: int, value: int, answer: int, *, is_reversed: bool = False) -> list[_Instruction]:
    """Returns `answer` when the loaded word compares to the value by `jump`; if is_reversed, when it does not."""
    when_true, when_false = (1, 0) if is_reversed else (0, 1)
    return [(jump, when_true, when_false, value), (_RETURN, 0, 0, answer)]


def _plan_check(check: ArgumentCheck) -> list[_Instruction]:
    # All arguments that are checked are ints of 32 bits, whatever stands in the upper half.
    hit, otherwise = (_TRAP, _ALLOW) if check.is_forbidden else (_ALLOW, _TRAP)
    code: list[_Instruction] = [(_LOAD, 0, 0, _AT_ARGUMENTS + 8 * check.argument), (_AND, 0, 0, check.mask)]
    for value in check.values:
        code += _answer_if(_JUMP_EQUAL, value, hit)
    return [*code, (_RETURN, 0, 0, otherwise)]


# Entering.

# linux/prctl.h, linux/seccomp.h, asm-generic/signal-defs.h.
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_SPEC_ALLOW: Final = 4
_SA_SIGINFO: Final = 4
# Offsets in siginfo_t of SIGSYS: si_syscall and si_arch, asm-generic/siginfo.h, where pointers have 64 bits.
_SI_SYSCALL: Final = 24
_SI_ARCH: Final = 28


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class _Action(ctypes.Structure):
    """struct sigaction of the C library: the same in glibc and musl, where pointers have 64 bits."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
# What the kernel calls must never be collected.
_kept: list[object] = []


class SandboxError(Exception):
    """This host has no such sandbox; the text gives the reason."""


def limit_memory(ceiling_bytes: int = MEMORY_CEILING_BYTES) -> None:
    """Sets the ceiling, unless there is a lower one."""
    lowest = min(
        (limit for limit in resource.getrlimit(resource.RLIMIT_DATA) if limit != resource.RLIM_INFINITY),
        default=ceiling_bytes,
    )
    ceiling_bytes = min(ceiling_bytes, lowest)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling_bytes, ceiling_bytes))


def enter_sandbox(tell: Callable[[str], None], *, is_by_hand: bool = False) -> None:
    """Limits the process to its work for the rest of its life. tell prints the line that names a refused call.

    The process can import no module afterwards. Raises SandboxError, and then no part of the filter is in force.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SandboxError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    machine = os.uname().machine
    architecture = ARCHITECTURES.get(machine)
    if architecture is None or sys.maxsize < 2**32:
        raise SandboxError(f"there is no table of system calls for {machine}, {sys.maxsize.bit_length() + 1} bits")
    _catch_refusals(libc, tell)
    code = plan_filter(architecture, is_by_hand=is_by_hand)
    program = _Program(len(code) // 8, code)
    call = number_calls(architecture)["seccomp"]
    # Without the flag older kernels slow the whole process down, against code that reads its own process's memory.
    for flags in (_SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0):
        if libc.syscall(call, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program)) == 0:
            return
    raise SandboxError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def _catch_refusals(libc: ctypes.CDLL, tell: Callable[[str], None]) -> None:
    """Sets a handler for SIGSYS that names the call and ends the process. Without a handler, the signal itself ends it.

    Python within a signal handler is safe here: there is one thread, and a refused call never comes from within the
    allocator, whose calls are allowed.
    """

    def refuse(_number: int, info: int, _context: int) -> None:
        call = ctypes.c_int.from_address(info + _SI_SYSCALL).value
        architecture = ctypes.c_uint.from_address(info + _SI_ARCH).value
        frame = sys._getframe(1)
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        tell(f"the system call {name_call(architecture, call)} is not allowed here; it came from {place}")
        os._exit(SANDBOX_STATUS)

    try:
        handler = _Handler(refuse)
    except (MemoryError, OSError):
        # Some hosts allow no memory that is writable and executable, which a callback may need.
        return
    action = _Action(ctypes.cast(handler, ctypes.c_void_p), (ctypes.c_ulong * 16)(), _SA_SIGINFO, None)
    _kept.append(handler)
    libc.sigaction(signal.SIGSYS, ctypes.byref(action), None)
