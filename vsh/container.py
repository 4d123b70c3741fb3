"""Shells in containers of a guest: vsh listens, a vshd in the container connects back, and the session runs on that.

What starts that vshd is a command of the user's configuration, run through the guest's own vshd for as long as the
session lasts. The direction being reversed, it is vsh that checks where the connection comes from (upstream's rules).
"""

import _socket
import os
import select
import tempfile
import threading
import time

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import VshError
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump
from vsh.session import Session, make_limits, open_session
from vsh.transport import listen_vsock
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

DEFAULT_CONTAINER = "penguin"
# Upstream's.
CONNECT_TIMEOUT_S = 5.0
# A launcher says why it failed, not more.
OUTPUT_LIMIT_BYTES = 64 << 10
# Host ports that nothing of ours uses, for hybrid vsock, where no kernel picks one.
FIRST_FREE_PORT = 49152


class Listener:
    """Where the container's vshd will connect. `port` is a vsock port; `place` what --forward_to takes."""

    def __init__(self, listening: "_socket.socket", port: int, place: str, path: str = "") -> None:
        self.socket = listening
        self.port = port
        self.place = place
        self._path = path

    def close(self) -> None:
        self.socket.close()
        if self._path:
            try:
                os.unlink(self._path)
            except OSError:
                pass


def open_container(vm: Address, container: str, launch: list[str], listen_port: int | None) -> Address:
    """Starts a vshd in a container of `vm`, and returns its connection. Raises VshError."""
    if not launch:
        raise VshError(
            "do not know how to start a vshd in a container",
            hint="set launch in the table [container] of the configuration; see vsh(1)",
        )
    listener = _listen(vm, listen_port)
    try:
        launcher = _Launcher(vm, _render(launch, container, listener))
        fd = _wait_for(listener, launcher, vm, container)
    finally:
        listener.close()
    os.set_blocking(fd, False)
    found = Address.descriptor(fd)
    found.name = f"container '{container}' of {vm.name}"
    return found


def _render(launch: list[str], container: str, listener: Listener) -> list[str]:
    """The command with its {container}, {port} and {place} filled in."""
    words = {"{container}": container, "{port}": str(listener.port), "{place}": listener.place}
    rendered = launch
    for name, value in words.items():
        rendered = [word.replace(name, value) for word in rendered]
    return rendered


def _listen(vm: Address, listen_port: int | None) -> Listener:
    if vm.kind == kinds.VSOCK:
        listening, port = listen_vsock(1, listen_port)
        return Listener(listening, port, f"vsock:2:{port}")
    if vm.kind == kinds.HYBRID:
        # A guest's connection to host port N of a hybrid vsock arrives at PATH_N.
        return _listen_hybrid(vm.path, listen_port)
    if vm.kind == kinds.UNIX:
        path = tempfile.mktemp(prefix="vsh-container-")  # noqa: S306 - bind() fails if somebody else was first
        return _bind(path, 0)
    raise VshError("containers need --cid, --vm_name, --uds or --unix", status=kinds.USAGE_STATUS)


def _listen_hybrid(path: str, listen_port: int | None) -> Listener:
    ports = [listen_port] if listen_port is not None else range(FIRST_FREE_PORT, FIRST_FREE_PORT + 1000)
    for port in ports:
        try:
            return _bind(f"{path}_{port}", port)
        except OSError:
            continue
    raise VshError("Failed to bind vsh port", details=f"{path}_PORT: every port is taken")


def _bind(path: str, port: int) -> Listener:
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
        listening.listen(1)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    place = f"vsock:2:{port}" if port else f"unix:{path}"
    return Listener(listening, port, place, path)


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


def _wait_for(listener: Listener, launcher: _Launcher, vm: Address, container: str) -> int:
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
        fd, peer = listener.socket._accept()  # type: ignore[attr-defined]
        if listener.socket.family == _socket.AF_VSOCK and peer[0] != vm.cid:
            os.close(fd)
            raise VshError(f"Received connection from VM {peer[0]} but expected {vm.cid}")
        return int(fd)


def _said(launcher: _Launcher) -> str:
    return launcher.output.take().decode("utf-8", "replace")
