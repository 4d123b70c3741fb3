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

from tests.vsh.live import DEADLINE_S, ENVIRONMENT


class Typist:
    """`screen` is all that was shown since the last expect()."""

    def __init__(self, argv, size=(30, 100), shell=None, env=None, pass_fds=()):
        self.master, self.slave = os.openpty()
        self.resize(*size, tell=False)
        self.runtime = tempfile.TemporaryDirectory(prefix="vsh-")
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            argv if shell is None else shell,
            env={**ENVIRONMENT, "VMKIT_RUNTIME_DIR": self.runtime.name, **(env or {})},
            pass_fds=pass_fds,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - tests start no threads here
        )
        self.screen = b""

    def expect(self, text):
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

    def type(self, data):
        os.write(self.master, data)

    def resize(self, rows, cols, *, tell=True):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def wait(self):
        return self.process.wait(DEADLINE_S)

    def is_restored(self):
        return termios.tcgetattr(self.slave) == self.before

    def is_raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def stop_foreground(self):
        """SIGSTOP for the job that has the terminal."""
        os.killpg(os.tcgetpgrp(self.master), signal.SIGSTOP)

    def hang_up(self):
        """The window is closed."""
        os.close(self.master)
        self.master = -1

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.runtime.cleanup()
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def typing(vshd, *words, **options):
    typist = Typist([sys.executable, "-m", "vsh", *vshd.where, *words], **options)
    try:
        yield typist
    finally:
        typist.close()
