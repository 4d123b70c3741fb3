"""What virtiofsd cannot do on this host, whatever its guest asks: make a device, or a program that runs as its owner.

virtiofsd sets each mode that the guest wants, and has no option against it. So the kernel looks at its system calls
(seccomp), before they reach a file. A mode with setuid or setgid is refused with EPERM, and so is a file that is
neither a regular one, a folder nor a link. Calls whose mode the kernel cannot see there are refused as well.

Specification: linux/seccomp.h, linux/filter.h and seccomp(2).
"""

import ctypes
import errno
import os
import stat
import struct
from typing import Final

from vmkit.vsock.syscalls import ARCHITECTURES, X86_64, number_calls

# linux/prctl.h, linux/seccomp.h.
PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_SET_MODE_FILTER: Final = 1
# linux/bpf_common.h: load an absolute word; AND; jump if equal, if greater or equal; return.
_LOAD: Final = 0x20
_AND: Final = 0x54
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_EQUAL: Final = 0x35
_RETURN: Final = 0x06
_AT_NUMBER: Final = 0
_AT_ARCHITECTURE: Final = 4
_AT_ARGUMENTS: Final = 16
_FAIL: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000
# __X32_SYSCALL_BIT, asm/unistd.h: another table of calls under the same architecture.
_X32_BIT: Final = 0x40000000

SET_ID: Final = stat.S_ISUID | stat.S_ISGID
# asm-generic/fcntl.h: __O_TMPFILE, beside O_DIRECTORY. Only these flags make a file, with the mode.
_MAKING: Final = os.O_CREAT | 0o20000000
# Where the mode is, by call; and the flags, of those that may not make a file.
_MODES: Final = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1}
_OPENING: Final = {"open": (1, 2), "openat": (2, 3)}
_NODES: Final = {"mknod": 1, "mknodat": 2}
# A socket would be a file. Attributes may be a program's capabilities.
_REFUSED: Final = "bind setxattr lsetxattr fsetxattr setxattrat file_setattr"
# Programs take others where the kernel has none of these: their modes are in memory.
_UNKNOWN: Final = "openat2 io_uring_setup io_uring_enter io_uring_register"

_Instruction = tuple[int, int, int, int]
_REFUSE: Final = (_RETURN, 0, 0, _FAIL | errno.EPERM)


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def has_filter() -> bool:
    """Whether this host's processor has a table of calls."""
    return os.uname().machine in ARCHITECTURES


def plan_filter(architecture: int | None = None) -> bytes:
    """Returns the program that the kernel runs at each system call, as an array of struct sock_filter.

    architecture: this host's where it is None.
    """
    architecture = architecture or ARCHITECTURES[os.uname().machine]
    numbers = number_calls(architecture)
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        _REFUSE,
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if architecture == X86_64:
        code += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _REFUSE]
    for name, argument in _MODES.items():
        code += _plan_call(numbers, name, _refuse_bits(argument, SET_ID))
    for name, (flags, mode) in _OPENING.items():
        bits = _refuse_bits(mode, SET_ID)
        is_making = [_load(flags), (_AND, 0, 0, _MAKING), (_JUMP_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
        code += _plan_call(numbers, name, [*is_making, *bits])
    for name, argument in _NODES.items():
        kind = [_load(argument), (_AND, 0, 0, 0o170000), (_JUMP_EQUAL, 2, 0, 0), (_JUMP_EQUAL, 1, 0, stat.S_IFREG)]
        code += _plan_call(numbers, name, [*kind, _REFUSE, *_refuse_bits(argument, SET_ID)])
    for names, code_number in ((_REFUSED, errno.EPERM), (_UNKNOWN, errno.ENOSYS)):
        for name in names.split():
            code += _plan_call(numbers, name, [(_RETURN, 0, 0, _FAIL | code_number)])
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _plan_call(numbers: dict[str, int], name: str, block: list[_Instruction]) -> list[_Instruction]:
    """The block for one call, where the architecture has it; the block always returns."""
    return [(_JUMP_EQUAL, 0, len(block), numbers[name]), *block] if name in numbers else []


def _refuse_bits(argument: int, bits: int) -> list[_Instruction]:
    return [_load(argument), (_AND, 0, 0, bits), (_JUMP_EQUAL, 1, 0, 0), _REFUSE, (_RETURN, 0, 0, _ALLOW)]


def _load(argument: int) -> _Instruction:
    """The lower half of an argument, on processors that are little endian."""
    return (_LOAD, 0, 0, _AT_ARGUMENTS + 8 * argument)


def enter_filter(code: bytes) -> None:
    """Puts this process, and all that it becomes, under the filter. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _FilterProgram(len(code) // 8, code)
    call = number_calls(ARCHITECTURES[os.uname().machine])["seccomp"]
    if (
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.syscall(call, SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(program)) != 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
