"""The program vmkit: the one place that prints errors and decides exit statuses."""

import os
import signal
import sys
from types import FrameType

import click

from vmkit.cli.main import vmkit
from vsh.errors import VshError

EXIT_USAGE = 64
EXIT_INTERRUPTED = 128 + signal.SIGINT


class _Stopped(BaseException):
    """SIGTERM or SIGHUP: unwinds every with-block, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> int:
    """Runs the command line; the exit status is 0, the error's own, 64 for bad usage, 128+N for signal N."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stopped)
    try:
        vmkit.main(standalone_mode=False)
    except VshError as error:
        if "VMKIT_DEBUG" in os.environ:
            raise
        print(error.render("vmkit"), file=sys.stderr)
        return error.status
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("vmkit: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except _Stopped as stopped:
        return 128 + stopped.number
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        print(f"vmkit: {error.format_message()}", file=sys.stderr)
        path = context.command_path if context is not None else "vmkit"
        print(f"hint: {path} --help", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said, not even by the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _raise_stopped(number: int, _frame: FrameType | None) -> None:
    raise _Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
