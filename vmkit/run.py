"""The only door to other programs: what was run can always be shown, ready to paste into a shell.

Long-lived children (QEMU, the monitor, the device) are started by vmkit.machine, which owns their lives; their argv
is made printable here.
"""

import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmkit.errors import CommandError, HostError

log = logging.getLogger("vmkit.run")

# Enough of a failed program's output to see the cause, not so much that it hides the brief above it.
OUTPUT_TAIL_LINES = 20


def render_command(argv: Sequence[str | Path]) -> str:
    """`argv` as one line a person can paste into a shell."""
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
    Raises HostError when the program is not there, CommandError when it fails or outlives timeout_s seconds.
    """
    words = [str(word) for word in argv]
    log.debug("run: %s", render_command(words))
    try:
        done = subprocess.run(
            words,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=None if env is None else dict(env),
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        hint = f"install it: sudo apt-get install {package}" if package else ""
        raise HostError(f"cannot find the program '{words[0]}'", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"'{words[0]}' did not end within {timeout_s:g} s", details=render_command(words)) from error
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace").splitlines()[-OUTPUT_TAIL_LINES:]
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise CommandError(f"'{words[0]}' failed with {how}", details="\n".join([render_command(words), *output]))
    return done.stdout
