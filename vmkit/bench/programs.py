"""Runs the programs of the race and takes their time. Gives each a deadline, and checks its result."""

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from vmkit.errors import CommandError, HostError
from vmkit.run import render_command

Popen = subprocess.Popen[bytes]
DEADLINE_S = 300.0
START_DEADLINE_S = 30.0


def time_program(argv: Sequence[str], *, stdin: Path | None = None, deadline_s: float = DEADLINE_S) -> float:
    """Returns the seconds from fork to exit. Raises CommandError when the program fails."""
    with open(stdin or "/dev/null", "rb") as source:  # noqa: PTH123 - one of the two has no other name
        started_s = time.perf_counter()
        process = _start(argv, source, subprocess.DEVNULL)
        _finish(process, argv, deadline_s)
        return time.perf_counter() - started_s


def start_program(argv: Sequence[str], *, stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE) -> Popen:
    """Starts a program, with pipes unless a stream is named. Raises HostError when it is not installed."""
    try:
        return subprocess.Popen(list(argv), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed") from error


def time_many(argv: Sequence[str], count: int, *, deadline_s: float = DEADLINE_S) -> float:
    """Returns the seconds until `count` programs, started at once, have all succeeded."""
    started_s = time.perf_counter()
    processes = [_start(argv, subprocess.DEVNULL, subprocess.DEVNULL) for _ in range(count)]
    try:
        for process in processes:
            _finish(process, argv, max(1.0, deadline_s - (time.perf_counter() - started_s)))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return time.perf_counter() - started_s


def time_pipeline(first: Sequence[str], second: Sequence[str], *, deadline_s: float = DEADLINE_S) -> float:
    """Returns the seconds of `first | second`."""
    started_s = time.perf_counter()
    producer = _start(first, subprocess.DEVNULL, subprocess.PIPE)
    consumer = _start(second, producer.stdout, subprocess.DEVNULL)
    if producer.stdout is not None:
        producer.stdout.close()
    try:
        _finish(consumer, second, deadline_s)
        _finish(producer, first, deadline_s)
    finally:
        if producer.poll() is None:
            producer.kill()
            producer.wait()
    return time.perf_counter() - started_s


class Running:
    """A program that runs for as long as the block lasts."""

    def __init__(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = argv
        self._env = env
        self._pass_fds = pass_fds

    def __enter__(self) -> Self:
        try:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=self._pass_fds,
                env=self._env,
                bufsize=0,
            )
        except FileNotFoundError as error:
            raise HostError(f"cannot find the program '{self.argv[0]}'") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


def _start(argv: Sequence[str], stdin: IO[bytes] | int | None, stdout: int) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise HostError(f"cannot find the program '{argv[0]}'") from error


def _finish(process: "subprocess.Popen[bytes]", argv: Sequence[str], deadline_s: float) -> None:
    assert process.stderr is not None
    try:
        if not _wait(process, deadline_s):
            process.kill()
            process.wait()
            raise CommandError(f"'{argv[0]}' did not end within {deadline_s:g} s", details=render_command(argv))
    finally:
        words = process.stderr.read(4096) if process.poll() is not None else b""
        process.stderr.close()
    if process.returncode != 0:
        raise CommandError(
            f"'{argv[0]}' failed with status {process.returncode}",
            details=f"{render_command(argv)}\n{words.decode(errors='replace')}",
        )


def _wait(process: "subprocess.Popen[bytes]", deadline_s: float) -> bool:
    """Waits until the process has ended; False when it does not in time.

    Popen.wait() with a deadline polls at intervals of up to 50 ms, and so would round the measured time up.
    """
    fd = os.pidfd_open(process.pid)
    try:
        has_ended = bool(select.select([fd], [], [], deadline_s)[0])
    finally:
        os.close(fd)
    if has_ended:
        process.wait()
    return has_ended
