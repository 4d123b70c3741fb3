"""The guest's side of the IPv6 mapping: TCP connections to [PREFIX::2]:PORT are brought to the host's vsock PORT.

Sets the kernel up with `ip` and `nft` (vshd(8) says what an image needs for that), and takes it down at the end.
"""

import os

from vshd import ready
from vshd.carry import endpoints
from vshd.carry.endpoints import PlaceError
from vshd.carry.mapping import MappingError, find_cid, find_original, parse_prefix, plan_commands, render_rules
from vshd.carry.vsock import HOST_CID
from vshd.flags import Options
from vshd.log import Log
from vshd.services.forward import Bringing, watch_for_stop
from vshd.signals import SIGINT, SIGTERM, Wakeup, find_ignored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class _Mapped(Bringing):
    """The one listener of all mapped addresses."""

    def __init__(self, prefix: bytes) -> None:
        listener = endpoints.listen("tcp:[::1]:0")
        super().__init__([listener])
        self._prefix = prefix
        self.port = int(listener.socket.getsockname()[1])

    def find_back(self, fd: int) -> str:
        try:
            address, port = find_original(fd)
            cid = find_cid(self._prefix, address)
        except OSError as error:
            raise PlaceError(f"a connection that was not redirected: {error.strerror}") from error
        except MappingError as error:
            raise PlaceError(str(error)) from error
        if cid != HOST_CID:
            raise PlaceError(f"CID {cid} is not the host's")
        return f"vsock:{cid}:{port}"


def run_mapping(options: Options, log: Log) -> int:
    """The mode: serves the mapping that the flags ask for, to its end. Raises OSError."""
    serve_mapping(options.ipv6, log, Wakeup((SIGTERM, SIGINT)), ready.tell_systemd)
    return 0


def serve_mapping(text: str, log: Log, wakeup: Wakeup, on_ready: "Callable[[], None]") -> None:
    """Serves until SIGTERM or SIGINT. Raises OSError when the kernel cannot be set up."""
    try:
        prefix = parse_prefix(text)
    except MappingError as error:
        raise OSError(22, str(error)) from error
    mapped = _Mapped(prefix)
    set_up, take_down = plan_commands(prefix)
    try:
        for argv in set_up:
            _run(argv)
        _run(["nft", "-f", "-"], render_rules(prefix, mapped.port))
        on_ready()
        stop = watch_for_stop(mapped.pairs, wakeup)
        mapped.serve(stop, log)
    finally:
        for argv in take_down:
            try:
                _run(argv)
            except OSError:
                pass


def _run(argv: list[str], text: str = "") -> None:
    """Runs a program with `text` as its stdin. Raises OSError."""
    reading, writing = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, reading, 0)]
        try:
            pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsigdef=find_ignored())
        except OSError as error:
            raise OSError(error.errno, f"cannot run {argv[0]}: {error.strerror}") from error
        # A few hundred bytes: a pipe takes them at once.
        os.write(writing, text.encode())
    finally:
        os.close(reading)
        os.close(writing)
    _, status = os.waitpid(pid, 0)
    if status:
        raise OSError(5, f"'{' '.join(argv)}' failed with {os.waitstatus_to_exitcode(status)}")
