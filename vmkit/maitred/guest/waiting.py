"""maitred before its first client: a small process that holds the sockets, and forks the server when one connects.

The server takes a second to start under emulation, and 27 MiB. A guest whose host never asks pays for neither.
"""

import contextlib
import os
import select
import time

from vmkit.maitred.messages import PORT, SOCKET
from vshd.carry.inherited import hold_stdio, settle_signals
from vshd.carry.vsock import HOST_CID, VsockError
from vshd.freeze import read_state
from vshd.listener import Listener, open_listener
from vshd.processes import reap_ended
from vshd.signals import SIGCHLD, SIGINT, SIGTERM, Wakeup
from vshd.wire.errors import TokenError

FREEZE_FILE = "/run/vshd.freeze"
COMMAND_LINE = "/proc/cmdline"
TOKEN_WORD = "vmkit.token="  # noqa: S105 - a word, not a secret
# A server that ends at once is not started again at once.
RESTART_S = 3.0


def is_token_demanded(command_line: str = COMMAND_LINE, freeze_file: str = FREEZE_FILE) -> bool:
    """Whether clients of this machine must prove a token: since its boot, or since it was restored."""
    try:
        state = read_state(freeze_file)
        with open(command_line, encoding="utf-8", errors="replace") as file:
            words = file.read().split()
    except (TokenError, OSError):
        # The safe answer.
        return True
    if state is not None:
        return state.is_frozen or state.token is not None
    return any(word.startswith(TOKEN_WORD) for word in words)


class Waiting:
    """Invariant: `_server` is the running server's pid, 0 without one."""

    def __init__(self, listeners: list[Listener], wakeup: Wakeup) -> None:
        self._listeners = listeners
        self._wakeup = wakeup
        self._server = 0
        self._started_s = -RESTART_S

    def run(self) -> None:
        """Until SIGTERM or SIGINT; the server ends then, too."""
        while True:
            poll = select.poll()
            poll.register(self._wakeup.fd, select.POLLIN)
            left_s = self._started_s + RESTART_S - time.monotonic()
            if not self._server and left_s <= 0:
                for listener in self._listeners:
                    poll.register(listener.socket.fileno(), select.POLLIN)
            ready = [fd for fd, _ in poll.poll(None if self._server or left_s <= 0 else left_s * 1000 + 1)]
            if self._wakeup.fd in ready:
                numbers = self._wakeup.take()
                for pid, _status in reap_ended():
                    self._server = 0 if pid == self._server else self._server
                if SIGTERM in numbers or SIGINT in numbers:
                    break
            elif ready:
                self._start()
        if self._server:
            os.kill(self._server, SIGTERM)
        for listener in self._listeners:
            listener.close()

    def _start(self) -> None:
        self._started_s = time.monotonic()
        pid = os.fork()
        if pid:
            self._server = pid
            return
        status = 1
        try:
            self._wakeup.close()
            run_server([listener.socket.fileno() for listener in self._listeners])
            status = 0
        except BaseException as error:  # reported here, or nowhere
            report(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)


def run_server(fds: list[int]) -> None:
    """Serves at listening sockets until there is nothing to do."""
    import asyncio  # noqa: PLC0415 - the waiting process has none of these
    import signal  # noqa: PLC0415

    for number in (SIGCHLD, SIGTERM, SIGINT):
        signal.signal(number, signal.SIG_DFL)
    from vmkit.maitred.guest.serving import serve  # noqa: PLC0415

    asyncio.run(serve(fds, is_token_demanded))


def report(text: str) -> None:
    """Prints an error on the console."""
    with contextlib.suppress(OSError):
        os.write(2, f"maitred: error: {text}\n".encode("utf-8", "replace"))


def main() -> int:
    """Waits for clients of maitred, and has them served."""
    settle_signals()
    hold_stdio()
    os.umask(0o022)
    allowed = frozenset((HOST_CID,))
    try:
        listeners = [open_listener(f"vsock:{PORT}", allowed), open_listener(f"unix:{SOCKET}", allowed)]
    except (VsockError, OSError) as error:
        report(str(error))
        return 1
    Waiting(listeners, Wakeup((SIGCHLD, SIGTERM, SIGINT))).run()
    return 0
