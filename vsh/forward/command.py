"""Forwards as a person asks for them: beside a command (-L, -R), instead of one (-N), or as a pipe (--proxy)."""

import _signal  # type: ignore[import-not-found]
import _socket
import os
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vsh import signals
from vsh.address import Address
from vsh.errors import VshError
from vsh.flags import Options
from vsh.forward.guest import connect_guest
from vsh.forward.service import Service
from vsh.forward.spec import LOCAL, REMOTE, Forward, parse_forward, parse_target, render_listening
from vshd.carry.bridge import Pairs, Side

USAGE_STATUS = 64
SIGNALLED = 128
ENDING = (signals.SIGHUP, signals.SIGINT, signals.SIGTERM)


def run_forwards(options: Options, where: Address) -> int:
    """-N: forwards until a signal ends it. Raises VshError."""
    service = _make_service(options, where)
    wakeup = signals.Wakeup(ENDING)
    with service:
        _tell_places(options, service)
        service.run(wakeup.fd)
    return SIGNALLED + next(iter(wakeup.take()), signals.SIGTERM)


@contextmanager
def open_forwards(options: Options, where: Address) -> Iterator[None]:
    """Forwards for as long as the block lasts, in a process of their own: a stalled session must not hold them up.

    Raises VshError when a forward cannot listen.
    """
    with _make_service(options, where) as service:
        _tell_places(options, service)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            _become_forwarder(service, reading)
        os.close(reading)
        try:
            yield
        finally:
            os.close(writing)
            os.waitpid(pid, 0)


def run_proxy(options: Options, where: Address) -> int:
    """--proxy: stdin and stdout are a connection to a place of the guest, until both ways have ended."""
    if options.command:
        raise VshError("--proxy takes no command", status=USAGE_STATUS)
    target = parse_target(options.proxy)
    fd, rest = connect_guest(where, target, user=options.user, timeout_s=options.connect_timeout)
    if options.fdpass:
        return _pass(fd, rest)
    pairs = Pairs()
    pairs.add(_Stdio(), Side(fd), to_left=rest)
    while pairs.count:
        pairs.turn()
    return 0


class _Stdio(Side):
    """This process's stdin and stdout."""

    def __init__(self) -> None:
        self.reading = 0
        self.writing = 1
        # See vsh.stdio.
        self.is_spliceable = not any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in (0, 1))
        self._was_blocking = [os.get_blocking(fd) for fd in (0, 1)]
        for fd in (0, 1):
            # The open file may be shared with whoever started us: it gets its mode back.
            os.set_blocking(fd, False)

    def end(self) -> None:
        null = os.open("/dev/null", os.O_WRONLY)
        os.set_blocking(1, self._was_blocking[1])
        _shut_if_socket(1)
        os.dup2(null, 1)
        os.close(null)

    def stop(self) -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        os.set_blocking(0, self._was_blocking[0])
        os.dup2(null, 0)
        os.close(null)

    def close(self, *, is_reset: bool = False) -> None:
        for fd, was_blocking in zip((0, 1), self._was_blocking, strict=True):
            try:
                os.set_blocking(fd, was_blocking)
            except OSError:
                pass


def _shut_if_socket(fd: int) -> None:
    """A socketpair as stdin and stdout (ssh's ProxyCommand has one): only shutdown() ends one way of it."""
    try:
        connection = _socket.socket(fileno=os.dup(fd))
    except OSError:
        return
    try:
        connection.shutdown(_socket.SHUT_WR)
    except OSError:
        pass
    connection.close()


def _pass(fd: int, rest: bytes) -> int:
    """ssh's ProxyUseFdpass: the connection itself goes over stdout, and nobody is in between any more."""
    if rest:
        raise VshError("the guest spoke before the connection could be passed", hint="use --proxy without --fdpass")
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


def _make_service(options: Options, where: Address) -> Service:
    forwards = [parse_forward(LOCAL, text) for text in options.local]
    forwards += [parse_forward(REMOTE, text) for text in options.remote]
    if not forwards:
        raise VshError("-N forwards only, and there is no -L and no -R", status=USAGE_STATUS)
    if options.forward_only and options.command:
        raise VshError("-N runs no command, and one was given", status=USAGE_STATUS)
    timeout_s = options.connect_timeout or 1e9
    return Service(lambda: where, forwards, user=options.user, timeout_s=timeout_s, tell=_tell)


def _become_forwarder(service: Service, stop_fd: int) -> None:
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
        service.run(stop_fd)
        status = 0
    except VshError as error:
        from vsh.text import clean_line  # noqa: PLC0415 - only after a failure

        _tell(clean_line(error.brief))
    finally:
        os._exit(status)


def _tell_places(options: Options, service: Service) -> None:
    """Where it listens: told when asked, and where only the kernel knows the port."""
    forwards = [parse_forward(LOCAL, text) for text in options.local]
    forwards += [parse_forward(REMOTE, text) for text in options.remote]
    for forward, place in zip(forwards, service.listening, strict=True):
        if options.verbose or options.debug or forward.listen.endswith(":0"):
            print(f"vsh: {_render(forward, place)}", file=sys.stderr, flush=True)


def _render(forward: Forward, place: str) -> str:
    return f"{render_listening(forward, place)} for {forward.target}"


def _tell(text: str) -> None:
    """In one write: lines of several programs must not mix."""
    try:
        os.write(2, f"vsh: {text}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass
