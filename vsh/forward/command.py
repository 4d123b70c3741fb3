"""Forwards as a person asks for them: beside a command (-L, -R, -D), instead of one (-N), or as a pipe (--proxy)."""

import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import _socket
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vsh import signals
from vsh.address import Address
from vsh.errors import VshError
from vsh.flags import Options
from vsh.forward.forwarder import Forwarder
from vsh.forward.guest import connect_guest
from vsh.forward.spec import DYNAMIC, LOCAL, REMOTE, ForwardSpec, parse_forward, parse_target, render_listening
from vsh.raw import join_stdio

USAGE_STATUS = 64
SIGNALLED = 128
ENDING = (signals.SIGHUP, signals.SIGINT, signals.SIGTERM)


def parse_forwards(options: Options) -> list[ForwardSpec]:
    """Returns the forwards of -L, -R and -D. Raises VshError."""
    forwards = [parse_forward(LOCAL, text) for text in options.local]
    forwards += [parse_forward(REMOTE, text) for text in options.remote]
    forwards += [parse_forward(DYNAMIC, text) for text in options.dynamic]
    if not forwards:
        raise VshError("-N needs a forward: add -L, -R or -D", status=USAGE_STATUS)
    if options.forward_only and options.command:
        raise VshError("-N runs no command: leave out -N or the command", status=USAGE_STATUS)
    return forwards


def parse_proxy(options: Options) -> str:
    """Returns the guest's place that --proxy names. Raises VshError."""
    if options.command:
        raise VshError("--proxy takes no command", status=USAGE_STATUS)
    return parse_target(options.proxy)


def run_forwards(options: Options, forwards: list[ForwardSpec], where: Address) -> int:
    """-N: forwards until a signal ends it. Raises VshError."""
    forwarder = _make_forwarder(options, forwards, where)
    wakeup = signals.Wakeup(ENDING)
    with forwarder:
        _tell_places(options, forwards, forwarder)
        forwarder.run(wakeup.fd)
    return SIGNALLED + next(iter(wakeup.take()), signals.SIGTERM)


@contextmanager
def open_forwards(options: Options, forwards: list[ForwardSpec], where: Address) -> Iterator[None]:
    """Forwards for as long as the block lasts, in a process of their own: a stalled session must not hold them up.

    Raises VshError when a forward cannot listen.
    """
    with _make_forwarder(options, forwards, where) as forwarder:
        _tell_places(options, forwards, forwarder)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            _become_forwarder(forwarder, reading)
        os.close(reading)
        try:
            yield
        finally:
            os.close(writing)
            os.waitpid(pid, 0)


def run_proxy(options: Options, target: str, where: Address) -> int:
    """--proxy: stdin and stdout are a connection to a place of the guest, until both ways have ended."""
    fd, rest = connect_guest(where, target, user=options.user, timeout_s=options.connect_timeout)
    if options.fdpass:
        return _pass(fd, rest)
    join_stdio(fd, rest)
    return 0


def _pass(fd: int, rest: bytes) -> int:
    """ssh's ProxyUseFdpass: the connection itself goes over stdout, and vsh is no longer in between."""
    if rest:
        raise VshError(
            "the guest sent data before vsh could pass the connection on", hint="use --proxy without --fdpass"
        )
    os.set_blocking(fd, True)
    try:
        stdout = _socket.socket(fileno=os.dup(1))
        stdout.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", fd))])
    except OSError as error:
        raise VshError(
            f"cannot pass a descriptor over stdout: {error.strerror}",
            hint="--fdpass is for programs that wait for one, as ssh with ProxyUseFdpass does",
        ) from error
    return 0


def _make_forwarder(options: Options, forwards: list[ForwardSpec], where: Address) -> Forwarder:
    timeout_s = options.connect_timeout or 1e9
    return Forwarder(lambda: where, forwards, user=options.user, timeout_s=timeout_s, tell=_tell)


def _become_forwarder(forwarder: Forwarder, stop_fd: int) -> None:
    """In the child: serves until the parent lets go of the pipe, and never returns."""
    status = 1
    try:
        # The terminal's signals are the session's.
        os.setsid()
        # And its streams: who reads our stdout must see its end.
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        for number in (signals.SIGHUP, signals.SIGINT, signals.SIGTERM):
            _signal.signal(number, _signal.SIG_DFL)
        forwarder.run(stop_fd)
        status = 0
    except VshError as error:
        from vsh.text import clean_line  # noqa: PLC0415 - only after a failure

        _tell(clean_line(error.brief))
    finally:
        os._exit(status)


def _tell_places(options: Options, forwards: list[ForwardSpec], forwarder: Forwarder) -> None:
    """Where it listens: told when asked, and where only the kernel knows the port."""
    for forward, place in zip(forwards, forwarder.listening, strict=True):
        if options.verbose or options.debug or forward.listen.endswith(":0"):
            print(f"vsh: {_render(forward, place)}", file=sys.stderr, flush=True)


def _render(forward: ForwardSpec, place: str) -> str:
    return f"{render_listening(forward, place)} for {forward.target}"


def _tell(text: str) -> None:
    """In one write: lines of several programs must not mix."""
    try:
        os.write(2, f"vsh: {text}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass
