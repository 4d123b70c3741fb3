"""A person at a terminal: vsh on a pty of its own, and what is typed and seen there."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd


class Typist:
    """`screen` is all that was shown since the last expect()."""

    def __init__(
        self,
        argv: Sequence[str],
        size: tuple[int, int] = (30, 100),
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.master, self.slave = os.openpty()
        self.resize(*size, pixels=(1000, 600), tell=False)
        self.runtime = tempfile.TemporaryDirectory(prefix="vsh-")
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            argv,
            env={**ENVIRONMENT, "VMKIT_RUNTIME_DIR": self.runtime.name, **(env or {})},
            pass_fds=pass_fds,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - tests start no threads here
        )
        self.screen = b""

    def expect(self, text: bytes) -> bytes:
        """Reads until `text` is on the screen; returns what stood before it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.screen:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.screen!r}"
            data = os.read(self.master, 4096)
            assert data, f"{text!r} is not in {self.screen!r}"
            self.screen += data
        before, _, self.screen = self.screen.partition(text)
        return before

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def resize(self, rows: int, cols: int, *, pixels: tuple[int, int] = (0, 0), tell: bool = True) -> None:
        """pixels: width and height."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, *pixels))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def stop_foreground(self) -> None:
        """SIGSTOP for the job that has the terminal."""
        os.killpg(os.tcgetpgrp(self.master), signal.SIGSTOP)

    def hang_up(self) -> None:
        """The window is closed."""
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.runtime.cleanup()
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def typing(vshd: Vshd, *words: str, **options: Any) -> Iterator[Typist]:
    typist = Typist([sys.executable, "-m", "vsh", *vshd.where, *words], **options)
    try:
        yield typist
    finally:
        typist.close()
