"""Runs programs that end soon. Each command can be printed, ready to paste into a shell.

vmkit.machine starts long-lived children (QEMU, the monitor, the device) and owns their lives. This module makes their
argv printable. tests/test_architecture.py lists the modules that start programs.
"""

import io
import logging
import os
import select
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vmkit.errors import CommandError, HostError

log = logging.getLogger("vmkit.run")

# Enough of a failed program's output to see the cause, not so much that it hides the brief above it.
OUTPUT_TAIL_LINES = 20
_OUTPUT_TAIL_BYTES = 64 << 10
_READ_BYTES = 256 << 10
# Of a child whose status was lost.
_UNKNOWN = 255


def render_command(argv: Sequence[str | Path]) -> str:
    """Returns `argv` as one line that a person can paste into a shell."""
    return shlex.join(str(word) for word in argv)


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    package: str = "",
) -> bytes:
    """Runs a program to its end and returns its stdout.

    env replaces the environment when given. package names the Debian package to suggest when the program is missing.
    Raises HostError when the program is missing, CommandError when it fails or outlives timeout_s seconds.
    """
    words = [str(word) for word in argv]
    log.debug("run: %s", render_command(words))
    try:
        with _Process(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
        ) as process:
            stdout, stderr = _communicate(process, stdin, timeout_s)
    except FileNotFoundError as error:
        raise _explain_missing(words[0], package) from error
    except subprocess.TimeoutExpired as error:
        raise _explain_slow(words, timeout_s) from error
    if process.is_lost:
        raise _explain_lost(words)
    if process.returncode != 0:
        raise _explain_failure(words, process.returncode, stdout + stderr)
    return stdout


def _communicate(process: "_Process", stdin: bytes, timeout_s: float) -> tuple[bytes, bytes]:
    """Feeds a program and collects its output up to its end. Kills the program on an exception."""
    try:
        return process.communicate(stdin, timeout_s)
    except BaseException:
        process.kill()
        raise


@contextmanager
def open_output(argv: Sequence[str | Path], *, timeout_s: float, package: str = "") -> Iterator[BinaryIO]:
    """Yields a program's stdout, as it comes: for output that need not be in memory as a whole.

    At the end of the block the program has ended with success. An exception in the block ends the program. Raises the
    errors of `run`, CommandError while reading, too.
    """
    words = [str(word) for word in argv]
    log.debug("run: %s", render_command(words))
    with open(os.memfd_create("stderr"), "r+b") as errors:  # noqa: PTH123  (it has no path)
        try:
            process = _Process(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError as error:
            raise _explain_missing(words[0], package) from error
        assert process.stdout is not None
        try:
            output = io.BufferedReader(_Output(process.stdout.fileno(), words, timeout_s), _READ_BYTES)
            yield output
            # A program whose reader goes away fails. So the rest is read, and the program can end well.
            while output.read(_READ_BYTES):
                pass
            process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise _explain_slow(words, timeout_s) from error
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if process.is_lost:
            raise _explain_lost(words)
        if process.returncode != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - _OUTPUT_TAIL_BYTES))
            raise _explain_failure(words, process.returncode, errors.read())


class _Output(io.RawIOBase):
    """A pipe that is read until a deadline."""

    def __init__(self, fd: int, words: Sequence[str], timeout_s: float) -> None:
        self._fd = fd
        self._words = words
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0 or not self._poll.poll(left_s * 1000):
            raise _explain_slow(self._words, self._timeout_s)
        return os.readv(self._fd, [buffer])


class _Process(subprocess.Popen[bytes]):
    """A child whose exit status is never guessed. Popen takes a missing exit status for 0.

    The status is missing when SIGCHLD is ignored, as the kernel then keeps none, or when another thread of the calling
    program has fetched it. Then `is_lost` is True, and `returncode` means nothing.
    """

    is_lost = False

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises TimeoutExpired."""
        if self.returncode is None:
            try:
                status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG)
                if status is None:
                    self._wait_for_end(timeout)
                    status = os.waitid(os.P_PID, self.pid, os.WEXITED)
            except ChildProcessError:
                self.is_lost = True
                self.returncode = _UNKNOWN
            else:
                assert status is not None
                self.returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        return self.returncode

    def _wait_for_end(self, timeout_s: float | None) -> None:
        fd = os.pidfd_open(self.pid)
        try:
            if not select.select([fd], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout_s or 0)
        finally:
            os.close(fd)


def _explain_missing(program: str, package: str) -> HostError:
    hint = f"install it: sudo apt-get install {package}" if package else ""
    return HostError(f"cannot find the program '{program}'", hint=hint)


def _explain_slow(words: Sequence[str], timeout_s: float) -> CommandError:
    return CommandError(f"'{words[0]}' did not end within {timeout_s:g} s", details=render_command(words))


def _explain_lost(words: Sequence[str]) -> HostError:
    return HostError(
        f"cannot tell how '{words[0]}' ended: this process did not get its exit status",
        details=render_command(words),
        hint="give SIGCHLD its default handler, and let no other thread wait for all children",
    )


def _explain_failure(words: Sequence[str], returncode: int, output: bytes) -> CommandError:
    lines = output.decode(errors="replace").splitlines()[-OUTPUT_TAIL_LINES:]
    how = f"status {returncode}" if returncode > 0 else f"signal {-returncode}"
    return CommandError(f"'{words[0]}' failed with {how}", details="\n".join([render_command(words), *lines]))
