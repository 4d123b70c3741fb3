"""The program vmkit: runs a verb. Only this module prints errors and decides exit statuses."""

import io
import os
import select
import signal
import sys
import time
import traceback
from types import FrameType
from typing import TextIO

import click

from vmkit.cli.main import vmkit
from vsh.errors import VshError
from vsh.limits import add_remedy, find_remedy
from vsh.patience import settle_output
from vshd.carry.inherited import hold_stdio

EXIT_ERROR = 1
EXIT_USAGE = 64
# What an interruption undoes has deadlines of its own, all together shorter than this.
CLEAN_UP_S = 20.0
_stopped_s = -CLEAN_UP_S


class _Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP came: unwinds every with-block, so that each undoes its work."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> int:
    """Runs the command line. Returns 0, the error's own status, 64 for bad usage, or 128+N for signal N."""
    _open_missing_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What was ignored when we were started stays so: nohup, a job in the background of a script.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_stopped)
    status = 0
    try:
        status = _run()
        # Flushes here: when the interpreter flushes at its end, it prints a failure in its own words.
        sys.stdout.flush()
    except _Stopped as stopped:
        _give_the_rest()
        if stopped.number == signal.SIGINT:
            # The terminal has shown ^C.
            print("\nvmkit: interrupted" if sys.stderr.isatty() else "vmkit: interrupted", file=sys.stderr)
        return 128 + stopped.number
    except BrokenPipeError:
        # The reader of our output has gone. The interpreter's own flush at the end must not fail on it either.
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        sys.stdout = io.StringIO()
        # A verb that could not write either has printed that already.
        return status or _tell(VshError(f"cannot write the answer: {error.strerror}", hint=find_remedy(error)))
    return status


def _give_the_rest() -> None:
    """Flushes the output from before an interruption, if the reader takes it. An interrupted pager takes nothing. The
    interpreter's own flush would then wait for its end, and print a traceback.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    try:
        if poll.poll(0):
            sys.stdout.flush()
            return
    except OSError:
        pass
    _drop_output()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> int:
    """Runs the command, prints its error, and returns its status."""
    streams = sys.stdout, sys.stderr
    try:
        vmkit.main(prog_name="vmkit", standalone_mode=False)
    except VshError as error:
        return _tell(error)
    except SystemExit as error:
        return _take_exit(error, *streams)
    except click.Abort as error:
        # click takes any EOFError for the end of what a person types, also one from a damaged file.
        return _tell_unforeseen(error.__cause__) if error.__cause__ else 128 + signal.SIGINT
    except click.ClickException as error:
        return _tell_usage(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _tell(VshError(f"{where}{error.strerror or error}", hint=find_remedy(error)))
    except Exception as error:
        return _tell_unforeseen(error)
    return 0


def _tell_unforeseen(error: BaseException) -> int:
    """Prints an error that no code of ours expects, and returns the status."""
    remedy = find_remedy(error)
    if remedy:
        return _tell(VshError(str(error) or type(error).__name__, hint=remedy))
    hint = "this is a fault of vmkit; `vmkit --debug ...` shows where"
    return _tell(VshError(f"internal error: {error!r}", hint=hint))


def _take_exit(error: SystemExit, stdout: TextIO, stderr: TextIO) -> int:
    """Returns the status of a verb that has ended the program. Raises BrokenPipeError when its answer had no reader."""
    if isinstance(error.__context__, BrokenPipeError):
        # rich ends so.
        raise error.__context__ from None
    if sys.stdout is not stdout:
        # click replaces the streams after EPIPE of whatever descriptor, and ends with 1.
        sys.stdout, sys.stderr = stdout, stderr
        if _has_lost_reader():
            raise BrokenPipeError from error
        return _tell(VshError("the other side has closed a connection", hint="`vmkit --debug ...` shows where"))
    return error.code if isinstance(error.code, int) else EXIT_ERROR


def _has_lost_reader() -> bool:
    """Whether the reader of our stdout or stderr has gone."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    return bool(poll.poll(0))


def _tell(error: VshError) -> int:
    """Prints an error, under --debug with its traceback; returns its status."""
    if os.environ.get("VMKIT_DEBUG"):
        traceback.print_exc(file=sys.stderr)
    _say(add_remedy(error).render("vmkit"))
    return error.status


def _say(text: str) -> None:
    """Prints to stderr. If that cannot be written, for one on a full disk, the status is still the error's own."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        # The interpreter's own flush at the end would change the status.
        sys.stderr = io.StringIO()


def _tell_usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _say(error.format_message())
        return EXIT_USAGE
    path = context.command_path if context is not None else "vmkit"
    _say(f"vmkit: {error.format_message()}\nhint: {path} --help")
    return EXIT_USAGE


def _open_missing_streams() -> None:
    """Opens /dev/null for a closed stdin, stdout or stderr. Otherwise the next socket would get its number, and output
    for the terminal would go there.
    """
    hold_stdio()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115  (for good)
    settle_output()
    # A path may have bytes, or letters, that the terminal's encoding does not have: they are printed as \\xNN.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _raise_stopped(number: int, _frame: FrameType | None) -> None:
    """Unwinds the program on the first signal. Ignores later signals meanwhile, so that they do not cut it short."""
    global _stopped_s  # noqa: PLW0603  (signal handlers have nowhere else)
    now_s = time.monotonic()
    # Python drops what is raised inside a finalizer: for such a case a later signal counts again.
    if now_s < _stopped_s + CLEAN_UP_S:
        return
    _stopped_s = now_s
    raise _Stopped(number)
