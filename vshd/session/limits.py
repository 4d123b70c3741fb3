"""Limits for one session's processes, on top of those of the daemon."""

import os

from vshd.flags import DEFAULT_PROCESSES, Options
from vshd.session.account import Account
from vshd.session.refusal import RefusalError
from vshd.wire import messages

MIB = 1 << 20
# In the smallest guest, too, a user can run a build.
PROCESSES_MIN = 128


def has_limits(options: Options, account: Account) -> bool:
    """Whether apply_limits() sets any."""
    return account.uid != 0 or options.max_processes != DEFAULT_PROCESSES or options.max_memory != 0


def apply_limits(options: Options, account: Account) -> None:
    """Sets the limits for this process and all it starts. Raises RefusalError: no session without those asked for."""
    if not has_limits(options, account):
        return
    is_default = options.max_processes == DEFAULT_PROCESSES
    try:
        # Not in every minimal Python: only where a limit is set.
        import resource  # noqa: PLC0415
    except ImportError as error:
        if is_default and not options.max_memory:
            return
        raise _cannot_limit("this Python has no module 'resource'") from error
    wanted = [(resource.RLIMIT_AS, options.max_memory * MIB)]
    if not is_default:
        wanted.append((resource.RLIMIT_NPROC, options.max_processes))
    elif account.uid:
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        processes = find_default_processes()
        # A default takes nothing back that the administrator has set.
        wanted.append((resource.RLIMIT_NPROC, processes if hard == resource.RLIM_INFINITY else min(processes, hard)))
    try:
        for number, size in wanted:
            if size:
                resource.setrlimit(number, (size, size))
    except (OSError, ValueError, OverflowError) as error:
        raise _cannot_limit(str(error)) from error


def find_default_processes() -> int:
    """How many processes a user other than root may have: one for each MiB of the system's memory.

    A process takes at least a fifth of that. The kernel's own default is so high that one user's processes fill the
    memory, and what the kernel ends then is not theirs alone.
    """
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    return max(PROCESSES_MIN, memory_mib)


def _cannot_limit(why: str) -> RefusalError:
    return RefusalError(f"could not set the session's limits: {why}", messages.LIMIT)
