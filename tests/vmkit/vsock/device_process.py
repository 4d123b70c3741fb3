"""The real device process, a fake guest on one side and host programs on the other, run from one test thread."""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.vmkit.vsock.fake_driver import GUEST_CID, WAIT_S, FakeDriver, GuestSocket

ROOT = Path(__file__).parents[3]


class HostProgram:
    """A host program's socket: bytes in and out without blocking."""

    def __init__(self, bench: "Bench", sock: socket.socket) -> None:
        self.bench = bench
        self.sock = sock
        sock.setblocking(False)
        self.data = bytearray()
        self.outbox = bytearray()
        self.is_reading = True
        self.is_ended = False
        self.is_broken = False
        self.is_closed = False
        self.ends_after_outbox = False

    def send(self, data: bytes) -> None:
        self.outbox += data
        self.pump()

    def end(self) -> None:
        """SHUT_WR once all is sent."""
        self.ends_after_outbox = True
        self.pump()

    def pump(self) -> None:
        if self.is_closed:
            return
        try:
            while self.outbox and (sent := self.sock.send(self.outbox[:262144], socket.MSG_NOSIGNAL)):
                del self.outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.is_broken = True
            self.outbox.clear()
        if self.ends_after_outbox and not self.outbox:
            self.ends_after_outbox = False
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        while self.is_reading and not self.is_ended:
            try:
                data = self.sock.recv(262144)
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.is_broken = self.is_ended = True
                return
            if not data:
                self.is_ended = True
            self.data += data

    def read_to_end(self) -> None:
        """Reads until the device ends this connection, whether or not its front end is still there."""
        deadline = time.monotonic() + WAIT_S
        while not self.is_ended:
            ready, _, _ = select.select([self.sock], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the device has not ended the connection"
            self.pump()

    def line(self) -> bytes:
        """Waits for a whole line and takes it."""
        self.bench.wait(lambda: b"\n" in self.data or self.is_ended, what="for a line from the device")
        line, _, rest = bytes(self.data).partition(b"\n")
        self.data[:] = rest
        return line

    def close(self) -> None:
        self.is_closed = True
        self.sock.close()


class Bench:
    """One device process with its guest. Everything waits with a deadline and moves only while wait() runs."""

    def __init__(self, directory: Path, *options: str, nofile: int | None = None) -> None:
        self.uds_path = directory / "v.sock"
        self.programs: list[HostProgram] = []
        self.listeners: list[socket.socket] = []
        front, back = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.uds_path))
        listener.listen(512)
        self.log_path = directory / "log"
        command = [sys.executable, "-m", "vmkit.vsock", "--guest-cid", str(GUEST_CID)]
        command += ["--vhost-user-fd", str(back.fileno()), "--listen-fd", str(listener.fileno())]
        # For the requests of `vmkit vsock`.
        self.control_path = directory / "c.sock"
        control = socket.socket(socket.AF_UNIX)
        control.bind(str(self.control_path))
        control.listen(16)
        command += ["--uds-path", str(self.uds_path), "--control-fd", str(control.fileno()), *options]
        if nofile is not None:
            command = ["sh", "-c", f'ulimit -n {nofile}; exec "$0" "$@"', *command]
        with self.log_path.open("wb") as log:
            fds = (back.fileno(), listener.fileno(), control.fileno())
            self.process = subprocess.Popen(command, pass_fds=fds, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)
        back.close()
        listener.close()
        control.close()
        self.front_socket = front
        self.driver = FakeDriver(front)

    def use_driver(self, **options: Any) -> FakeDriver:
        """Another kind of driver in place of the default one."""
        self.driver.front.sock = socket.socket()  # keep the real one open
        self.driver.close()
        self.driver = FakeDriver(self.front_socket, **options)
        return self.driver

    def wait(self, is_done: Callable[[], object], *, timeout_s: float = WAIT_S, what: str = "") -> None:
        """Runs guest and host programs until is_done()."""

        def step() -> bool:
            for program in self.programs:
                program.pump()
            return bool(is_done())

        self.driver.watched = [p.sock for p in self.programs if p.is_reading and not (p.is_ended or p.is_closed)]
        self.driver.wait(step, timeout_s=timeout_s, what=what)

    def wait_for_data(self, end: HostProgram | GuestSocket, data: bytes) -> None:
        """Until the last bytes that this end has received are these."""
        self.wait(lambda: end.data.endswith(data), what=f"the end of its data is {data[:20]!r}")

    def wait_for_reset(self, end: GuestSocket) -> None:
        self.wait(lambda: end.is_reset, what="it is reset")

    def settle(self) -> None:
        """Lets everything that is on its way arrive: two rounds through the device's loop."""
        for _ in range(3):
            self.driver.sync()
            self.driver.poll()
            for program in self.programs:
                program.pump()

    def connect(self) -> HostProgram:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.uds_path))
        return self._add(sock)

    def _add(self, sock: socket.socket) -> HostProgram:
        program = HostProgram(self, sock)
        self.programs.append(program)
        return program

    def open_to_guest(self, port: int) -> tuple[HostProgram, Any]:
        """A host program connected to a guest program that listens at `port`."""
        self.driver.listening.setdefault(port, [])
        program = self.connect()
        program.send(b"CONNECT %d\n" % port)
        assert program.line().startswith(b"OK ")
        return program, self.driver.accept(port)

    def listen(self, port: int, backlog: int = 128) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.uds_path}_{port}")
        listener.listen(backlog)
        listener.setblocking(False)
        self.listeners.append(listener)
        return listener

    def accept(self, listener: socket.socket) -> HostProgram:
        accepted: list[socket.socket] = []

        def try_accept() -> bool:
            with contextlib.suppress(BlockingIOError):
                accepted.append(listener.accept()[0])
            return bool(accepted)

        self.wait(try_accept, what="for the device to connect")
        return self._add(accepted[0])

    def open_to_host(self, port: int) -> tuple[HostProgram, Any]:
        """A guest program connected to a host program that listens at `port`."""
        listener = self.listen(port)
        sock = self.driver.dial(port)
        program = self.accept(listener)
        self.wait(lambda: sock.is_open, what="for RESPONSE")
        return program, sock

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_log(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while text not in self.log():
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.log()}"
            self.driver.wait(lambda: True)
            self.process.poll()
            time.sleep(0.005)

    def open_count(self) -> int:
        """How many connections the device says it holds."""
        pattern = re.compile(r"seen: (\d+) connections are open")
        before = len(pattern.findall(self.log()))
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + WAIT_S
        # Other lines about full places may be written at the same time.
        while len(found := pattern.findall(self.log())) == before:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log()
            time.sleep(0.005)
        return int(found[-1])

    def leave(self) -> int:
        """The front-end vanishes; returns the device's exit status."""
        self.front_socket.close()
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        for program in self.programs:
            program.close()
        for listener in self.listeners:
            listener.close()
        self.driver.close()
        if self.process.poll() is None:
            self.front_socket.close()
            try:
                self.process.wait(WAIT_S)
            finally:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def open_bench(*options: str, nofile: int | None = None) -> Iterator[Bench]:
    """A device process of its own; at the end it must have ended without a traceback."""
    # Not pytest's tmp_path: names of UNIX sockets have 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix="vsock-"))
    bench = Bench(directory, *options, nofile=nofile)
    try:
        yield bench
    finally:
        bench.close()
        log = bench.log()
        if os.environ.get("VSOCK_TEST_LOG"):
            print(log)
        shutil.rmtree(directory)
    assert "Traceback" not in log and "internal-error" not in log, log
    assert bench.process.returncode == 0, log
