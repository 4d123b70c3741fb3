"""The command line of the device process: reads argv, prints failures, chooses the exit status.

Two ways in. A monitor that owns all sockets hands them over as descriptors:
    python -m vmkit.vsock --guest-cid N --vhost-user-fd FD --listen-fd FD --uds-path PATH [--control-fd FD]
        [--privileged-port PORT]
By hand, with vhost-device-vsock's words, the device makes its own sockets and removes them at the end:
    python -m vmkit.vsock --guest-cid N --socket PATH --uds-path PATH [--control PATH]

Either way it enters a sandbox before it reads from a connection, see sandbox.py.
"""

import argparse
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmkit.vsock.backend import VhostUserBackend
from vmkit.vsock.muxer import MAX_CONNECTIONS
from vmkit.vsock.notices import Notices
from vmkit.vsock.packet import MAX_GUEST_CID, MIN_GUEST_CID
from vmkit.vsock.sandbox import SandboxError, enter_sandbox, limit_memory
from vshd.carry.inherited import hold_stdio, settle_signals
from vshd.carry.sockets import listen_at

USAGE_STATUS: Final = 64  # EX_USAGE, sysexits.h
INTERNAL_STATUS: Final = 70  # EX_SOFTWARE, sysexits.h
# Descriptors that are not connections: standard streams, epoll, listeners, kicks, calls, memory, those within a
# message.
RESERVED_FDS: Final = 64
# sun_path, sys/un.h, with its closing NUL; and room for "_4294967295", so that no port of the guest can be too long.
MAX_UDS_PATH_BYTES: Final = 108 - 1 - len("_4294967295")


class StartError(Exception):
    """The device cannot start; the text says why."""


def main(argv: list[str] | None = None) -> int:
    """Runs the device; returns the exit status."""
    settle_signals()
    hold_stdio()
    options = _parse_arguments(sys.argv[1:] if argv is None else argv)
    notices = Notices(f"vsock[{options.guest_cid}] ")
    with contextlib.ExitStack() as stack:
        try:
            if sys.byteorder != "little":
                raise StartError("rings are little endian, and this host is not")
            if len(os.fsencode(options.uds_path)) > MAX_UDS_PATH_BYTES:
                raise StartError(f"--uds-path is longer than {MAX_UDS_PATH_BYTES} bytes: {options.uds_path}")
            max_connections = _raise_file_limit()
            if options.socket is None:
                frontend = _adopt_socket(options.vhost_user_fd, "--vhost-user-fd")
                listener = _adopt_socket(options.listen_fd, "--listen-fd")
                control = _adopt_control(options.control_fd)
            else:
                control = stack.enter_context(_bind_socket(options.control)) if options.control else None
                # The front-end's comes last: a program that waits for it finds the other there, too.
                listener = stack.enter_context(_bind_socket(options.uds_path))
                frontend = stack.enter_context(_bind_socket(options.socket))
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise StartError("the socket for host programs does not listen")
        except StartError as error:
            print(f"vmkit.vsock: {error}", file=sys.stderr)
            return 1
        backend = VhostUserBackend(
            frontend,
            listener,
            options.uds_path,
            options.guest_cid,
            notices,
            privileged_ports=tuple(options.privileged_port),
            max_connections=max_connections,
            control=control,
        )
        try:
            if not options.no_sandbox:
                _enter_sandbox(notices, is_by_hand=options.socket is not None)
            return backend.run()
        except Exception as error:
            # A fault of ours: one line with its place, for a report.
            notices.tell("internal-error", f"{error!r} at {_find_place(error)}")
            return INTERNAL_STATUS


def _enter_sandbox(notices: Notices, *, is_by_hand: bool) -> None:
    limit_memory()
    try:
        enter_sandbox(lambda text: notices.tell("sandbox", text), is_by_hand=is_by_hand)
    except SandboxError as error:
        # A device without a sandbox is better than none. This line in the log reports it.
        notices.tell("sandbox", f"this device runs without one: {error}")


def _find_place(error: BaseException) -> str:
    """Returns the file and line where the error was raised."""
    trace = error.__traceback__
    if trace is None:
        return "an unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vmkit.vsock", description="A virtio-vsock device over vhost-user.", allow_abbrev=False
    )
    parser.add_argument("--guest-cid", type=_parse_cid, required=True, metavar="N", help="the guest's address")
    parser.add_argument(
        "--uds-path", required=True, metavar="PATH", help="where host programs connect; PATH_PORT: where the guest does"
    )
    parser.add_argument("--vhost-user-fd", type=_parse_number, metavar="FD", help="a socket connected to the front-end")
    parser.add_argument("--listen-fd", type=_parse_number, metavar="FD", help="the listening socket of --uds-path")
    parser.add_argument("--control-fd", type=_parse_number, metavar="FD", help="the listening socket for vmkit vsock")
    parser.add_argument("--control", metavar="PATH", help="with --socket: where vmkit vsock connects")
    parser.add_argument("--socket", metavar="PATH", help="make the sockets here instead: where the front-end connects")
    parser.add_argument(
        "--privileged-port",
        type=_parse_number,
        action="append",
        default=[],
        metavar="PORT",
        help="a host port that only source ports below 1024 may reach; may be repeated",
    )
    parser.add_argument(
        "--no-sandbox", action="store_true", help="run without limits on system calls and memory, to look for faults"
    )
    try:
        options = parser.parse_args(argv)
    except SystemExit as error:
        # argparse ends a process with 2 for bad usage; this project's word for it is another.
        raise SystemExit(USAGE_STATUS if error.code else 0) from error
    has_fds = options.vhost_user_fd is not None and options.listen_fd is not None
    has_any_fd = options.vhost_user_fd is not None or options.listen_fd is not None
    if has_any_fd != has_fds or has_fds == (options.socket is not None):
        parser.print_usage(sys.stderr)
        print("vmkit.vsock: give either --socket, or both --vhost-user-fd and --listen-fd", file=sys.stderr)
        raise SystemExit(USAGE_STATUS)
    if options.control is not None and options.socket is None:
        print("vmkit.vsock: --control needs --socket; with descriptors it is --control-fd", file=sys.stderr)
        raise SystemExit(USAGE_STATUS)
    return options


def _parse_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"not a number: {text}")
    return int(text)


def _parse_cid(text: str) -> int:
    cid = _parse_number(text)
    if not MIN_GUEST_CID <= cid <= MAX_GUEST_CID:
        raise argparse.ArgumentTypeError(f"a guest's CID is from {MIN_GUEST_CID} to {MAX_GUEST_CID}: {text}")
    return cid


def _raise_file_limit() -> int:
    """Raises the soft limit of open files as far as we need; returns how many connections it carries."""
    wanted = MAX_CONNECTIONS + RESERVED_FDS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft <= RESERVED_FDS:
        raise StartError(f"the limit of {soft} open files leaves no room for connections")
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft - RESERVED_FDS)


def _adopt_control(fd: int | None) -> socket.socket | None:
    return None if fd is None else _adopt_socket(fd, "--control-fd")


def _adopt_socket(fd: int, option: str) -> socket.socket:
    """Returns the socket of a descriptor that the monitor left open. Raises StartError."""
    try:
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
    except OSError as error:
        raise StartError(f"{option} {fd} is not a socket: {error.strerror}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise StartError(f"{option} {fd} is not a UNIX stream socket")
    return sock


@contextlib.contextmanager
def _bind_socket(path: str) -> Iterator[socket.socket]:
    """Yields a listening socket at `path`, for its owner alone. Removes it at the end if it is still ours."""
    try:
        bound = listen_at(path, socket.SOMAXCONN)
    except OSError as error:
        raise StartError(f"cannot listen at {path}: {error.strerror or error}") from error
    with contextlib.closing(bound), socket.socket(fileno=os.dup(bound.socket.fileno())) as sock:
        yield sock


if __name__ == "__main__":
    sys.exit(main())
