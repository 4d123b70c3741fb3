"""Limits for one session's processes, on top of those of the daemon."""

from vshd.flags import Options
from vshd.session.refusal import RefusalError
from vshd.wire import messages

MIB = 1 << 20


def apply_limits(options: Options) -> None:
    """Sets the options' limits for this process and all it starts. Raises RefusalError: no session without them."""
    if not options.max_processes and not options.max_memory:
        return
    try:
        # Not in every minimal Python, and needed by few: only when asked for.
        import resource  # noqa: PLC0415
    except ImportError as error:
        raise _cannot_limit("this Python has no module 'resource'") from error
    wanted = ((resource.RLIMIT_NPROC, options.max_processes), (resource.RLIMIT_AS, options.max_memory * MIB))
    try:
        for number, size in wanted:
            if size:
                resource.setrlimit(number, (size, size))
    except (OSError, ValueError, OverflowError) as error:
        raise _cannot_limit(str(error)) from error


def _cannot_limit(why: str) -> RefusalError:
    return RefusalError(f"could not set the session's limits: {why}", messages.LIMIT)
