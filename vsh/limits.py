"""Limits of this process (setrlimit(2), `ulimit`): which one caused a failure, its value, how to raise it.

An errno names the limit and not its value. A program calls this module after a failure that it cannot explain itself.
"""

import errno
import resource

from vsh.errors import VshError

# Our own chains of causes are never deeper.
MAX_CAUSES = 8


def find_remedy(error: BaseException) -> str:
    """Returns the remedy for `error` when a limit is in its chain of causes; empty for other failures."""
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if cause is None:
            break
        remedy = _find_remedy(cause)
        if remedy:
            return remedy
        cause = cause.__cause__
    return ""


def add_remedy(error: VshError) -> VshError:
    """Returns the same error. When a limit caused it, its hint becomes the remedy."""
    error.hint = find_remedy(error) or error.hint
    return error


def raise_open_files(wanted: int) -> int:
    """Raises this process's soft limit of open files to `wanted`, as far as the hard one allows; returns the limit.

    A shell's soft limit is for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def _find_remedy(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        size = _read_limit(resource.RLIMIT_AS)
        return "" if size is None else f"this process may use {size >> 20} MiB; raise the limit: ulimit -v unlimited"
    # CPython's words (Python/thread.c); the class is everybody's.
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _render_processes()
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EMFILE:
        count = _read_limit(resource.RLIMIT_NOFILE)
        return f"this process may open {count} files; raise the limit: ulimit -n 1024"
    if code == errno.ENFILE:
        return "this host has no more open files; end programs, or raise the sysctl fs.file-max"
    if code == errno.EFBIG:
        size = _read_limit(resource.RLIMIT_FSIZE)
        # Without a limit it is the file system's own.
        return "" if size is None else f"a file may have {size} bytes; raise the limit: ulimit -f unlimited"
    # fork(2); every other EAGAIN is caught where it is met.
    return _render_processes() if code == errno.EAGAIN else ""


def _render_processes() -> str:
    count = _read_limit(resource.RLIMIT_NPROC)
    return "" if count is None else f"this user may have {count} processes and threads; raise the limit: ulimit -u"


def _read_limit(number: int) -> int | None:
    """Returns the soft limit; None for no limit."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft
