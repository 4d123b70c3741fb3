"""The leash: runs a command inside a container for as long as the client holds the other end of stdin.

`python3 -m vmkit.docker -- COMMAND ...`. The client never writes. The end of stdin means that the client is gone; then
the leash ends the command. Exit status: the command's, 128+N for signal N, 126 and 127 as in a shell.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys

from vshd.carry.inherited import hold_stdio, settle_signals

GRACE_S = 10.0


def main(argv: list[str]) -> int:
    """Runs the command and returns the exit status. argv: `--` and the command."""
    settle_signals()
    hold_stdio()
    command = argv[1:] if argv[:1] == ["--"] else argv
    # A session of its own: signals from here reach all of it, and none from its terminal reaches us.
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"vmkit: cannot run '{command[0]}': {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: _signal_all(process, number))
    ended = os.pidfd_open(process.pid)
    readable, _, _ = select.select([ended, 0], [], [])
    if ended not in readable:
        _signal_all(process, signal.SIGTERM)
        if not select.select([ended], [], [], GRACE_S)[0]:
            _signal_all(process, signal.SIGKILL)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _signal_all(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
