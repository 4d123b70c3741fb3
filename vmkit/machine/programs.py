"""Starts programs of ours that outlive this process, and ends them: a monitor, a forward, a share, a pool's keeper.

A program gets one end of a socketpair. What it is asked and what it answers there is a line of JSON each; a monitor's
plan is longer, and travels by vmkit.machine.handover.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import vmkit
from vmkit.errors import HostError
from vsh.errors import VshError

# A program that does not end within this has a fault.
END_PROGRAM_S = 10.0
# Its interpreter, and the guest's answer.
ANSWER_DEADLINE_S = 60.0
MAX_ANSWER_BYTES = 1 << 20
# After the standard descriptors.
FIRST_FREE_FD = 3
# Programs that may run: a Popen that is dropped before its process ends is a ResourceWarning, which may be an error.
_STARTED: "list[subprocess.Popen[bytes]]" = []


def render_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a monitor finds this very vmkit, wherever ours was found: its working directory is `/`,
    and -P adds none to its path.
    """
    paths = [str(Path(path).absolute()) for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    root = Path(vmkit.__file__).absolute().parent.parent
    # What is installed is found without help, and before the standard library it must not be.
    if root.name not in ("site-packages", "dist-packages"):
        paths.insert(0, str(root))
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else dict(environ)


def start_program(module: str, sock: socket.socket, output: BinaryIO | int) -> "subprocess.Popen[bytes]":
    """Starts a program of ours that outlives this process: `python -m MODULE FD`, where FD is `sock`.

    output: where its stdout and stderr go. Raises HostError.
    """
    try:
        # 0 to 2 become the child's standard streams; in a daemon that has closed its own, `sock` can be one of these.
        fd = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD)
        try:
            program = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(fd)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[fd],
                # A Ctrl-C in the terminal of `up` must not reach it, nor the hang-up when that terminal closes.
                start_new_session=True,
                cwd="/",
                env=render_environment(os.environ),
            )
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"cannot start python -m {module}: {error.strerror}") from error
    _share_priority(program.pid)
    _STARTED[:] = [*(started for started in _STARTED if started.poll() is None), program]
    return program


def end_program(program: "subprocess.Popen[bytes]") -> None:
    """Ends a program of start_program's that has not answered: by SIGTERM, and after END_PROGRAM_S by SIGKILL."""
    program.terminate()
    try:
        program.wait(END_PROGRAM_S)
    except subprocess.TimeoutExpired:
        # It waits for a guest that does not answer, and looks at no signal. Others sweep its entry.
        program.kill()
        program.wait()


def end_by_entry(pid: int, is_listed: Callable[[], bool]) -> bool:
    """Ends a program that another process started, in the same way. Returns False when it does not end.

    is_listed: whether the entry that names the pid is there still. Until then the pid may have become another's.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if not is_listed():
            return True
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(fd, number)
            if select.select([fd], [], [], END_PROGRAM_S)[0]:
                return True
        return False
    finally:
        os.close(fd)


def start_and_ask(module: str, what: str, request: Mapping[str, object]) -> dict[str, Any]:
    """Starts a program that serves until it is ended, and returns its answer to the request. what: as errors name it.

    Raises the error that the program answers, and HostError. Then it has ended.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            program = start_program(module, theirs, subprocess.DEVNULL)
        try:
            return _ask(ours, module, what, request)
        except BaseException:
            end_program(program)
            raise


def _ask(ours: socket.socket, module: str, what: str, request: Mapping[str, object]) -> dict[str, Any]:
    ours.settimeout(ANSWER_DEADLINE_S)
    try:
        ours.sendall(json.dumps(request).encode() + b"\n")
        with ours.makefile("rb") as answers:
            line = answers.readline(MAX_ANSWER_BYTES)
    except OSError as error:
        raise HostError(f"the process of the {what} does not answer") from error
    if not line:
        raise HostError(f"the process of the {what} ended at once", hint=f"`python3 -m {module}` prints why")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise VshError(**answer["error"])
    return answer


def _share_priority(pid: int) -> None:
    """Gives the new session of a program our low priority, where we have one.

    A process inherits its nice value. But with autogroups the scheduler compares sessions, and a new one is as any.
    """
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice > 0:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))
