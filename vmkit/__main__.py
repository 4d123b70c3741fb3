"""The entry point of vmkit. It is light, so that an interruption finds it ready; vmkit.cli.program has all the rest."""

import os
import signal
import sys
from types import FrameType

from vshd.carry.inherited import OF_PEOPLE, settle_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Runs the command line. Returns 0, the error's own status, 64 for bad usage, or 128+N for signal N."""
    settle_signals(OF_PEOPLE)
    for number in NUMBERS:
        # What was ignored when we were started stays so: nohup, a job in the background of a script.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    # The rest loads for a tenth of a second, and Python would print a traceback of that.
    from vmkit.cli import program  # noqa: PLC0415

    return program.main()


def _end(number: int, _frame: FrameType | None) -> None:
    """Ends the program while it loads: there is nothing to undo yet."""
    try:
        if number == signal.SIGINT:
            # The terminal has shown ^C.
            os.write(2, b"\nvmkit: interrupted\n" if os.isatty(2) else b"vmkit: interrupted\n")
    finally:
        # Also where stderr is closed.
        os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
