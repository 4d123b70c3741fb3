"""Opens files beneath a folder, and nowhere else: two system calls that Python 3.11 lacks.

openat2(2) with RESOLVE_BENEATH has the kernel itself hold the walk within the folder, whatever others rename meanwhile.
No symlink is followed, no link of /proc, and no other file system that is mounted below is entered.
"""

import ctypes
import errno
import os

# linux/openat2.h
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 0x01, 0x02, 0x04, 0x08
RESOLVE = NO_XDEV | NO_MAGICLINKS | NO_SYMLINKS | BENEATH
# Its number is the same on every architecture (asm-generic/unistd.h).
OPENAT2 = 437
# linux/fs.h
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
TRIES = 16
# PATH_MAX is 4096, with the zero byte.
PIECE_MAX = 4000

PATH_ONLY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _How(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(folder: int, names: list[bytes], flags: int = PATH_ONLY) -> int:
    """Opens the file of this path beneath a folder; the folder itself for an empty one. Raises OSError."""
    directory, rest = folder, names
    try:
        while (size := _count(rest)) < len(rest):
            inner = _open(directory, b"/".join(rest[:size]), PATH_ONLY | os.O_DIRECTORY)
            if directory != folder:
                os.close(directory)
            directory, rest = inner, rest[size:]
        return _open(directory, b"/".join(rest) or b".", flags)
    finally:
        if directory != folder:
            os.close(directory)


def _count(names: list[bytes]) -> int:
    """How many of the names one path can have."""
    size = 0
    for index, name in enumerate(names):
        size += len(name) + 1
        if size > PIECE_MAX:
            return index
    return len(names)


def _open(directory: int, path: bytes, flags: int) -> int:
    how = _How(flags, 0, RESOLVE)
    for tries_left in range(TRIES, 0, -1):
        fd: int = _libc.syscall(
            ctypes.c_long(OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        # Something was renamed while the kernel walked, which it could not tell from an escape; or a signal came.
        if code not in (errno.EAGAIN, errno.EINTR) or tries_left == 1:
            raise OSError(code, os.strerror(code))
    raise AssertionError("the last try returns or raises")


def rename(old_folder: int, old: bytes, new_folder: int, new: bytes, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _libc.renameat2(old_folder, old, new_folder, new, ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
