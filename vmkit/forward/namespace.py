"""The IPv6 mapping of vsock on this host: in a network namespace of a command's own, or on request for the whole host.

In the namespace every [PREFIX::CID]:PORT is that guest's vsock port. The namespace otherwise has only loopback, needs
no privilege, and is gone with the command. This module runs twice. Here it plans the mapping and enters the namespace.
There, as `python -m vmkit.forward.namespace`, it sets the mapping up, starts the command and serves.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from vmkit.entries.folder import open_runtime_directory
from vmkit.errors import CommandError, ConfigError, HostError
from vmkit.machine.programs import render_environment
from vmkit.run import run
from vsh.errors import VshError
from vsh.forward.forwarder import Forwarder
from vsh.forward.spec import MAPPED, ForwardSpec
from vsh.signals import SIGHUP, SIGINT, SIGTERM, Wakeup
from vshd.carry.inherited import OF_PEOPLE, OF_PYTHON, hold_stdio, settle_signals
from vshd.carry.mapping import (
    PREFIX_BYTES,
    UNIQUE_LOCAL,
    MappingError,
    parse_prefix,
    plan_commands,
    render_prefix,
    render_rules,
)

PREFIX_FILE = "ipv6-prefix"
# Each of ip and nft takes milliseconds.
COMMAND_TIMEOUT_S = 20.0
NOT_FOUND, NOT_EXECUTABLE, SIGNALLED = 127, 126, 128
# For commands, in place of an address: "[${VMKIT_PREFIX}::3]:80".
VARIABLE = "VMKIT_PREFIX"
# Words before a command: root of a network namespace of its own, with nothing in it.
ENTER = ("unshare", "--user", "--map-root-user", "--net", "--")

Handlers = dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None]


@dataclass(frozen=True, slots=True)
class Mapping:
    """The mapping to set up: the prefix's 8 bytes; the command, or none to serve until a signal; its user and group."""

    prefix: bytes
    command: tuple[str, ...]
    is_host_wide: bool
    uid: int
    gid: int


def choose_prefix(text: str | None) -> bytes:
    """Returns the requested prefix, else this user's own: random, and as long-lived as the runtime directory."""
    if text is not None:
        try:
            return parse_prefix(text)
        except MappingError as error:
            raise ConfigError(str(error)) from error
    path = open_runtime_directory() / PREFIX_FILE
    with contextlib.suppress(OSError, MappingError):
        return parse_prefix(path.read_text().strip())
    prefix = bytes([UNIQUE_LOCAL]) + os.urandom(PREFIX_BYTES - 1)
    path.write_text(render_prefix(prefix))
    return prefix


def run_mapped(mapping: Mapping) -> int:
    """Sets the mapping up, runs the command, and returns its exit status. Raises VshError."""
    return _serve(mapping) if mapping.is_host_wide else _enter(mapping)


def _enter(mapping: Mapping) -> NoReturn:
    """Continues as main() in a namespace of its own. Raises HostError when it cannot make one."""
    try:
        run([*ENTER, "true"], timeout_s=COMMAND_TIMEOUT_S, package="util-linux")
    except CommandError as error:
        raise HostError(
            "this host does not let you make a network namespace",
            details=error.details,
            hint="sysctl kernel.unprivileged_userns_clone, ...apparmor_restrict_unprivileged_userns; or --host-wide",
        ) from error
    words = [render_prefix(mapping.prefix), str(mapping.uid), str(mapping.gid), *mapping.command]
    environment = render_entry_environment()
    argv = [*ENTER, sys.executable, "-P", "-m", "vmkit.forward.namespace", *words]
    os.execvpe(argv[0], argv, environment)  # noqa: S606 - nothing of us is needed any more


def render_entry_environment() -> dict[str, str]:
    """Returns the environment in which a program of ours behind ENTER finds this vmkit and its machines."""
    # In the namespace we are root, whose runtime directory is another one.
    return {**render_environment(os.environ), "VMKIT_RUNTIME_DIR": str(open_runtime_directory())}


def _serve(mapping: Mapping) -> int:
    with _set_up(mapping) as forwarder:
        if not mapping.command:
            wakeup = Wakeup((SIGHUP, SIGINT, SIGTERM))
            forwarder.run(wakeup.fd)
            return SIGNALLED + next(iter(wakeup.take()), SIGTERM)
        return _run_command(mapping, forwarder)


@contextlib.contextmanager
def _set_up(mapping: Mapping) -> Iterator[Forwarder]:
    """Sets up the kernel's tables and a forwarder behind them. Removes both at the end."""
    forward = ForwardSpec(MAPPED, "tcp:[::1]:0", render_prefix(mapping.prefix))
    set_up, take_down = plan_commands(mapping.prefix)
    with contextlib.ExitStack() as stack:
        if not mapping.is_host_wide:
            run_tool(["ip", "link", "set", "lo", "up"])
        forwarder = stack.enter_context(Forwarder(_find_nobody, [forward], tell=_tell))
        port = int(forwarder.listening[0].rpartition(":")[2])
        if mapping.is_host_wide:
            for argv in take_down:
                stack.callback(_run_quietly, argv)
        for argv in set_up:
            run_tool(argv)
        run_tool(["nft", "-f", "-"], render_rules(mapping.prefix, port))
        yield forwarder


def _run_command(mapping: Mapping, forwarder: Forwarder) -> int:
    """Runs the command beside the forwarder; returns its exit status in a shell's form."""
    words = list(mapping.command)
    if mapping.uid and not mapping.is_host_wide:
        # It is its user again, in a user namespace below this one, and has no power over the network.
        words = ["unshare", "--user", f"--map-user={mapping.uid}", f"--map-group={mapping.gid}", "--", *words]
    prefix = render_prefix(mapping.prefix).removesuffix("::/64").removesuffix("/64")
    # Ctrl-C is the command's.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGQUIT)}
    try:
        process = subprocess.Popen(words, env={**os.environ, VARIABLE: prefix}, preexec_fn=_give_back(before))  # noqa: PLW1509
    except FileNotFoundError as error:
        raise VshError(f"{words[0]}: command not found", status=NOT_FOUND) from error
    except OSError as error:
        raise VshError(f"{words[0]}: {error.strerror}", status=NOT_EXECUTABLE) from error
    fd = os.pidfd_open(process.pid)
    try:
        forwarder.run(fd)
        status = process.wait()
    finally:
        os.close(fd)
        if process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return SIGNALLED - status if status < 0 else status


def _give_back(before: Handlers) -> Callable[[], None]:
    """Returns a preexec hook that restores the signals that we ignore: the command gets them as they came to us.

    before: our earlier handlers of those signals.
    """
    numbers = (*OF_PYTHON, *(number for number, handler in before.items() if handler is not signal.SIG_IGN))

    def hook() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    return hook


def run_tool(argv: Sequence[str], text: str = "") -> None:
    """Runs ip or nft, with `text` as its input. Raises HostError, CommandError."""
    package = {"ip": "iproute2", "nft": "nftables"}[argv[0]]
    run(argv, timeout_s=COMMAND_TIMEOUT_S, stdin=text.encode(), env=render_tools_environment(), package=package)


def render_tools_environment() -> dict[str, str]:
    """Returns the environment to find ip and nft, administrators' tools whose folder a user's PATH may lack."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def _run_quietly(argv: Sequence[str]) -> None:
    with contextlib.suppress(VshError):
        run_tool(argv)


def _find_nobody() -> NoReturn:
    raise VshError("every connection names its CID")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"vmkit: {text}\n".encode("utf-8", "replace"))


def main() -> int:
    """Runs in the namespace, with the arguments PREFIX UID GID command..."""
    settle_signals(OF_PEOPLE)
    hold_stdio()
    prefix, uid, gid, *command = sys.argv[1:]
    try:
        return _serve(Mapping(parse_prefix(prefix), tuple(command), False, int(uid), int(gid)))
    except VshError as error:
        with contextlib.suppress(OSError):
            print(error.render("vmkit"), file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
