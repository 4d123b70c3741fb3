"""Shells in containers of a guest: vsh listens, a vshd in the container connects back, and the session runs on that.

A command of the user's configuration starts that vshd. It runs through the guest's own vshd for as long as the session
lasts. Its standard input is the token of this one session. The vshd that connects must prove the token, because every
program of the guest can connect to the port (docs/reference/protocol.md 4). ChromeOS's vshd has no tokens.
"""

import os
import threading
import time

from vsh.address import Address
from vsh.callers import Callers
from vsh.errors import VshError
from vsh.listener import HostListener, listen_for_guest
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump
from vsh.session import Session, make_limits, open_session
from vsh.text import clean_text
from vsh.transport import wait_until
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.proof import CLIENT, NONCE_BYTES, TOKEN_BYTES, Proof, render_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vshd.wire.client import ClientConnection

DEFAULT_CONTAINER = "penguin"
# Upstream waits 5 s. Under emulation on a busy host the start of a container and of its vshd took 10 s.
CONNECT_TIMEOUT_S = 20.0
BACKLOG = 128
# A launcher prints why it failed, not more.
OUTPUT_LIMIT_BYTES = 64 << 10


def open_container(
    vm: Address, container: str, launch: list[str], listen_port: int | None, *, is_legacy: bool = False
) -> Address:
    """Starts a vshd in a container of `vm`. Returns the address of the one session that it serves. Raises VshError.

    is_legacy: that vshd is ChromeOS's and can prove nothing, so vsh takes the first connection for it.
    """
    if not launch:
        raise VshError(
            "the configuration has no command that starts a vshd in a container",
            hint="set launch in its table [container]; see vsh(1), CONTAINERS",
        )
    token = None if is_legacy else os.urandom(TOKEN_BYTES)
    listener = listen_for_guest(vm, listen_port, backlog=1 if is_legacy else BACKLOG)
    try:
        launcher = _Launcher(vm, _render(launch, container, listener), token)
    except BaseException:
        listener.close()
        raise
    name = f"container '{container}' of {vm.name}"
    return Address.behind_door(Door(listener, launcher, token, f"{vm.name}:{container}"), name)


def _render(launch: list[str], container: str, listener: HostListener) -> list[str]:
    """Returns the command with its {container}, {port} and {place} filled in."""
    words = {"{container}": container, "{port}": str(listener.port), "{place}": listener.place}
    rendered = launch
    for name, value in words.items():
        rendered = [word.replace(name, value) for word in rendered]
    return rendered


class _Launcher:
    """The command that starts the container's vshd. It runs in the guest and ends with this process.

    It reads the token from its standard input, a pipe that no other user can read. An argument or a variable would be
    in /proc.
    """

    def __init__(self, vm: Address, argv: list[str], token: bytes | None) -> None:
        request = SetupConnectionRequest(
            target=messages.VM_SHELL, argv=[os.fsencode(word) for word in argv], nopty=True
        )
        self.session: Session = open_session(vm, request, limits=make_limits(), timeout_s=CONNECT_TIMEOUT_S)
        self.output = CaptureSink(OUTPUT_LIMIT_BYTES)
        self.ended_fd, self._ended_end = os.pipe()
        self._input = b"" if token is None else render_token(token) + b"\n"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sinks = {messages.STDOUT: self.output, messages.STDERR: self.output}
        try:
            Pump(self.session, BytesSource(self._input), dict(sinks)).run()
        except VshError:
            pass
        os.close(self._ended_end)


class Door:
    """Receives the container's vshd. Invariant: the listener is open until admit() has returned or raised."""

    def __init__(self, listener: HostListener, launcher: _Launcher, token: bytes | None, name: str) -> None:
        """name: the container's name, for errors."""
        self._listener: HostListener | None = listener
        self._launcher = launcher
        self.is_token_demanded = token is not None
        self._token = token
        self._name = name
        self._deadline_s = time.monotonic() + CONNECT_TIMEOUT_S

    def admit(self, make_connection: "Callable[[Proof | None], ClientConnection]") -> tuple[int, "ClientConnection"]:
        """Returns the vshd's non-blocking descriptor, and its connection, proven and with the request to send.

        make_connection: returns a new connection with its setup to send, which demands this proof. Raises VshError.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            raise VshError("the vshd of a container serves one session", hint="forwards go through the guest itself")
        callers = Callers(listener, lambda: make_connection(self._make_proof()))
        callers.watch(self._launcher.ended_fd)
        try:
            return self._wait_for_peer(callers, listener, make_connection)
        finally:
            callers.close()
            listener.close()

    def _make_proof(self) -> Proof | None:
        """Makes the proof for one caller. Each caller needs a new one, because a nonce serves once."""
        return None if self._token is None else Proof(CLIENT, self._token, os.urandom(NONCE_BYTES))

    def _wait_for_peer(
        self,
        callers: Callers,
        listener: HostListener,
        make_connection: "Callable[[Proof | None], ClientConnection]",
    ) -> tuple[int, "ClientConnection"]:
        while True:
            ready = wait_until(callers.wait, self._deadline_s)
            if not ready:
                raise self._explain(callers, "the container's vshd did not connect in time")
            if self._token is None and listener.socket.fileno() in ready:
                # Nothing tells it from a stranger but, on vhost, its CID: accept() raises for another one.
                try:
                    fd = listener.accept()
                except BlockingIOError:
                    continue
                os.set_blocking(fd, False)
                return fd, make_connection(None)
            for fd in ready:
                found = callers.serve(fd)
                if found is not None:
                    return found
            if ready == [self._launcher.ended_fd]:
                raise self._explain(callers, f"Failed to launch vshd for {self._name}")

    def _explain(self, callers: Callers, brief: str) -> VshError:
        """Explains why no vshd has proven itself, from the launcher's output and the fate of the callers."""
        said = clean_text(self._launcher.output.take()).strip()
        details = [said] if said else []
        hint = ""
        if callers.strangers:
            details.append(f"{callers.strangers} connections did not prove the token; the last: {callers.reason}")
            hint = "the vshd needs --token_from=stdin and the launcher's standard input; see vsh(1), CONTAINERS"
        return VshError(brief, details="\n".join(details), hint=hint)
