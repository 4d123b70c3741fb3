"""Shells in containers of a guest: vsh listens, a vshd in the container connects back, and the session runs on that.

What starts that vshd is a command of the user's configuration, run through the guest's own vshd for as long as the
session lasts. The direction being reversed, it is vsh that checks where the connection comes from (upstream's rules).
"""

import os
import select
import threading
import time

from vsh.address import Address
from vsh.errors import VshError
from vsh.listener import HostListener, listen_for_guest
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump
from vsh.session import Session, make_limits, open_session
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

DEFAULT_CONTAINER = "penguin"
# Upstream's.
CONNECT_TIMEOUT_S = 5.0
# A launcher says why it failed, not more.
OUTPUT_LIMIT_BYTES = 64 << 10


def open_container(vm: Address, container: str, launch: list[str], listen_port: int | None) -> Address:
    """Starts a vshd in a container of `vm`, and returns its connection. Raises VshError."""
    if not launch:
        raise VshError(
            "do not know how to start a vshd in a container",
            hint="set launch in the table [container] of the configuration; see vsh(1)",
        )
    listener = listen_for_guest(vm, listen_port)
    try:
        launcher = _Launcher(vm, _render(launch, container, listener))
        fd = _wait_for(listener, launcher, vm, container)
    finally:
        listener.close()
    os.set_blocking(fd, False)
    found = Address.descriptor(fd)
    found.name = f"container '{container}' of {vm.name}"
    return found


def _render(launch: list[str], container: str, listener: HostListener) -> list[str]:
    """The command with its {container}, {port} and {place} filled in."""
    words = {"{container}": container, "{port}": str(listener.port), "{place}": listener.place}
    rendered = launch
    for name, value in words.items():
        rendered = [word.replace(name, value) for word in rendered]
    return rendered


class _Launcher:
    """The command that starts the container's vshd, running in the guest; it ends with this process."""

    def __init__(self, vm: Address, argv: list[str]) -> None:
        request = SetupConnectionRequest(
            target=messages.VM_SHELL, argv=[os.fsencode(word) for word in argv], nopty=True
        )
        self.session: Session = open_session(vm, request, limits=make_limits(), timeout_s=CONNECT_TIMEOUT_S)
        self.output = CaptureSink(OUTPUT_LIMIT_BYTES)
        self.ended_fd, self._ended_end = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sinks = {messages.STDOUT: self.output, messages.STDERR: self.output}
        try:
            Pump(self.session, BytesSource(b""), dict(sinks)).run()
        except VshError:
            pass
        os.close(self._ended_end)


def _wait_for(listener: HostListener, launcher: _Launcher, vm: Address, container: str) -> int:
    """The container's connection, from the right guest."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    poll = select.poll()
    poll.register(listener.socket.fileno(), select.POLLIN)
    poll.register(launcher.ended_fd, select.POLLIN)
    while True:
        left_s = deadline_s - time.monotonic()
        ready = [fd for fd, _ in poll.poll(left_s * 1000)] if left_s > 0 else []
        if not ready:
            raise VshError(f"Poll timed out after waiting {CONNECT_TIMEOUT_S:.0f} seconds.", details=_said(launcher))
        if listener.socket.fileno() not in ready:
            raise VshError(f"Failed to launch vshd for {vm.name}:{container}", details=_said(launcher))
        return listener.accept()


def _said(launcher: _Launcher) -> str:
    return launcher.output.take().decode("utf-8", "replace")
