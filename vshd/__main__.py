"""vshd's entry: flags, socket, ready, serve; the only place that prints and exits."""

import os
import sys

from vshd import ready
from vshd.carry.inherited import hold_stdio, settle_signals
from vshd.carry.vsock import VsockError
from vshd.flags import HELP, OTHER_MODES, FlagError, Options, parse_flags
from vshd.listener import Listener, open_listener, parse_allowed_cids, take_passed_listener
from vshd.log import Log
from vshd.signals import SIGCHLD, SIGHUP, SIGINT, SIGTERM, Wakeup
from vshd.wire.errors import TokenError
from vshd.wire.version import __version__

# A shell's status for SIGPIPE.
PIPE_BROKEN = 128 + 13

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Runs vshd with `argv` (sys.argv's words by default) and returns its exit status."""
    try:
        options = parse_flags(sys.argv[1:] if argv is None else argv)
        if options.help:
            return _print(HELP)
        if options.version:
            return _print(f"vshd {__version__}\n")
        return serve(options)
    except FlagError as error:
        print(error, file=sys.stderr)
        return error.status


def _print(text: str) -> int:
    """Prints an answer; the exit status."""
    try:
        os.write(1, text.encode())
    except BrokenPipeError:
        return PIPE_BROKEN
    except OSError as error:
        print(f"vshd: cannot write the answer: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def serve(
    options: Options,
    on_ready: "Callable[[], None] | None" = None,
    bound: "_socket.socket | None" = None,
    facts: bytes = b"",
) -> int:
    """Listens and serves until told to end; on_ready is called once clients are accepted. Raises FlagError.

    bound: a socket that has vshd's port already. facts: what the host is told with READY.
    """
    # nohup is for daemons, too.
    settle_signals((SIGHUP,))
    hold_stdio()
    _keep_to_ourselves()
    # A target's files are its user's business; the daemon's umask may be pid 1's.
    os.umask(0o022)
    log = Log()
    log.open(use_kmsg=options.log_kmsg, use_stderr=options.log_stderr)
    try:
        if any(getattr(options, flag) for flag in OTHER_MODES):
            from vshd.services.table import run_mode  # noqa: PLC0415 - most guests never need it

            status = run_mode(options, log)
            if status is not None:
                return status
        allowed_cids = parse_allowed_cids(options.allow_cid)
        listener = take_passed_listener(allowed_cids) or open_listener(options.listen, allowed_cids, bound)
        # Where a token must be and is not, nobody is told that we are ready. Where one may be, looking can wait as the
        # rest of the server does.
        is_certain = options.token_from != "auto"  # noqa: S105 - where it is, not what
        token = _find_token(options, listener) if is_certain else None
        # From here on a SIGTERM waits until the server takes it.
        wakeup = Wakeup((SIGCHLD, SIGTERM, SIGINT))
        log.info("vshd started")
        if options.ready:
            ready.tell_host(*ready.parse_address(options.ready), facts)
        ready.tell_systemd()
        if on_ready is not None:
            on_ready()
        # Imported here: half of the daemon's start under emulation, and the socket already queues who connects.
        from vshd.server import Server  # noqa: PLC0415

        token = token if is_certain else _find_token(options, listener)
        Server(listener, options, log, wakeup, token).run()
        return 0
    except (VsockError, TokenError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        log.error(text)
        if not log.has_stderr:
            print(f"vshd: {text}", file=sys.stderr)
        return 1


def _find_token(options: Options, listener: Listener) -> bytes | None:
    """What clients must prove. Raises TokenError, OSError, and leaves no socket behind."""
    from vshd.firmware import check_provable, find_token  # noqa: PLC0415  (see serve)

    try:
        token = find_token(options.token_from, is_vsock=listener.is_vsock)
        check_provable(token, options)
    except BaseException:
        listener.close()
        raise
    return token


def _keep_to_ourselves() -> None:
    """No target inherits what whoever started vshd had open; Python's own descriptors are kept from them anyway."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return
    for fd in map(int, names):
        if fd > 2:
            try:
                os.set_inheritable(fd, False)
            except OSError:
                pass  # the one that listdir() had


if __name__ == "__main__":
    sys.exit(main())
