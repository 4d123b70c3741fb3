"""Limits for one session's processes, on top of those of the daemon."""

from vshd.flags import Options

MIB = 1 << 20


class LimitError(Exception):
    """A limit was asked for that this Python cannot set."""


def apply_limits(options: Options) -> None:
    """Sets the options' limits for this process and all it starts. Raises LimitError."""
    if not options.max_processes and not options.max_memory:
        return
    try:
        # Not in every minimal Python, and needed by few: only when asked for.
        import resource  # noqa: PLC0415
    except ImportError as error:
        raise LimitError("this Python has no module 'resource', which limits need") from error
    if options.max_processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (options.max_processes, options.max_processes))
    if options.max_memory:
        size = options.max_memory * MIB
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
