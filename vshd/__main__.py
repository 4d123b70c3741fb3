"""vshd's entry point: flags, socket, ready, serve. Only this module prints and exits."""

import gc
import os
import sys

from vshd import ready
from vshd.carry.inherited import hold_stdio, settle_signals
from vshd.carry.vsock import VsockError
from vshd.flags import HELP, OTHER_MODES, FlagError, Options, parse_flags
from vshd.listener import Listener, open_listener, parse_allowed_cids, take_passed_listener
from vshd.log import Log
from vshd.signals import SIGCHLD, SIGHUP, SIGINT, SIGTERM, Wakeup

# A shell's status for SIGPIPE.
PIPE_BROKEN = 128 + 13

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from vshd.freeze import FreezeState
    from vshd.root import Root


def main(argv: list[str] | None = None) -> int:
    """Runs vshd with `argv` (sys.argv's words by default) and returns its exit status."""
    try:
        options = parse_flags(sys.argv[1:] if argv is None else argv)
        if options.help:
            return _print(HELP)
        if options.version:
            from vshd.wire.version import __version__  # noqa: PLC0415 - a daemon that serves prints none

            return _print(f"vshd {__version__}\n")
        return serve(options)
    except FlagError as error:
        print(error, file=sys.stderr)
        return error.status


def _print(text: str) -> int:
    """Prints an answer and returns the exit status."""
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
    """Listens and serves until a signal ends it. Calls on_ready once it accepts clients. Raises FlagError.

    bound: a socket that has vshd's port already. facts: lines that vshd sends the host with READY.
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
        root = _open_root(options)
        allowed_cids = parse_allowed_cids(options.allow_cid)
        listener = take_passed_listener(allowed_cids) or open_listener(options.listen, allowed_cids, bound)
        # When a required token is missing, vshd sends no READY. An optional token is looked for later, with the rest of
        # the server.
        is_certain = options.token_from != "auto"  # noqa: S105 - where it is, not what
        state = _read_state(options, listener)
        token = _find_token(options, listener) if is_certain and state is None else None
        # From here on a SIGTERM waits until the server takes it.
        wakeup = Wakeup((SIGCHLD, SIGTERM, SIGINT))
        log.info("vshd started")
        if options.ready:
            ready.tell_host(*ready.parse_address(options.ready), facts)
        ready.tell_systemd()
        if on_ready is not None:
            on_ready()
        # Imported here: half of the daemon's start under emulation, and the socket already queues connections.
        # Python collects no garbage meanwhile: modules leave none, and looking takes two milliseconds. Server.run()
        # switches collections on again.
        gc.disable()
        from vshd.server import Server  # noqa: PLC0415

        if state is not None:
            token = state.token
        elif not is_certain:
            token = _find_token(options, listener)
        is_frozen = state is not None and state.is_frozen
        Server(listener, options, log, wakeup, token, is_frozen=is_frozen, facts=facts, root=root).run()
        return 0
    except (VsockError, OSError, ValueError) as error:
        return _report_failure(error, log)


def _report_failure(error: Exception, log: Log) -> int:
    """Logs why the daemon cannot serve and returns its status. Raises a ValueError that is no fault of the token."""
    from vshd.wire.errors import TokenError  # noqa: PLC0415 - a daemon that serves meets none

    if isinstance(error, ValueError) and not isinstance(error, TokenError):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    log.error(text)
    if not log.has_stderr:
        print(f"vshd: {text}", file=sys.stderr)
    return 1


def _find_token(options: Options, listener: Listener) -> bytes | None:
    """Returns the token that clients must prove. Raises TokenError, OSError, and leaves no socket behind."""
    from vshd.firmware import check_provable, find_token  # noqa: PLC0415  (see serve)

    try:
        token = find_token(options.token_from, is_vsock=listener.is_vsock)
        check_provable(token, options)
    except BaseException:
        listener.close()
        raise
    return token


def _open_root(options: Options) -> "Root | None":
    """Returns the root of sessions, where it is not vshd's own. Raises OSError."""
    if not options.root_namespace:
        return None
    from vshd.root import open_root  # noqa: PLC0415 - most guests have one root

    return open_root(options.root_namespace)


def _read_state(options: Options, listener: Listener) -> "FreezeState | None":
    """Whether a vshd before this one was frozen or thawed. Raises TokenError, OSError, and leaves no socket behind."""
    if not options.freeze_file or not os.path.exists(options.freeze_file):
        return None
    from vshd.freeze import read_state  # noqa: PLC0415 - few machines are saved

    try:
        return read_state(options.freeze_file)
    except BaseException:
        listener.close()
        raise


def _keep_to_ourselves() -> None:
    """Keeps targets from inheriting descriptors that vshd got at its start. Python protects those that it opens."""
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
