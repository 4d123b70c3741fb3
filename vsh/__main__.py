"""vsh's entry point. Only this module prints errors and exits."""

import gc
import os
import sys

from vsh.errors import ConnectionLost, VshError
from vsh.flags import HELP, Options, find_config_path, parse_flags
from vshd.carry.inherited import OF_PEOPLE, hold_stdio, settle_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 128 + 2
PIPE_BROKEN = 128 + 13
CLOSED_MAX = 4096


def main(argv: list[str] | None = None) -> int:
    """Runs vsh with `argv` (sys.argv's words by default) and returns its exit status."""
    if argv is None:
        # What loads is no garbage, and the collector would look for some in all of it, again and again.
        gc.disable()
    words = sys.argv[1:] if argv is None else argv
    options = Options()
    # Of the words alone: an error in them has options of no kind.
    options.debug = "--debug" in words
    return _report(_start, options, words)


def _start(options: Options, words: list[str]) -> int:
    """Runs vsh with `words`; `options` becomes what they say."""
    settle_signals(OF_PEOPLE)
    hold_stdio()
    if not (os.get_blocking(1) and os.get_blocking(2)):
        _settle_output()
    vars(options).update(vars(parse_flags(words)))
    if options.help:
        return _print(HELP)
    if options.version:
        from vshd.wire.version import __version__  # noqa: PLC0415 - most commands print none

        return _print(f"vsh {__version__}\n")
    if options.completion or options.list_hosts or options.launcher:
        return _print(_render_help(options))
    if options.multi:
        from vsh.multi import run_multi  # noqa: PLC0415 - most commands run in one machine

        return run_multi(options, lambda own: _report(_run, own, words))
    return _run(options, words)


def _run(options: Options, _words: list[str]) -> int:
    from vsh import cli  # noqa: PLC0415 - not before the collector is off

    if not gc.isenabled():
        # Not even at the program's end.
        gc.freeze()
        gc.enable()
    _apply_config(options)
    return cli.run(options)


def _report(work: "Callable[[Options, list[str]], int]", options: Options, words: list[str]) -> int:
    """Runs `work`, prints its error, and returns its status."""
    try:
        return work(options, words)
    except VshError as error:
        if options.debug:
            sys.excepthook(*sys.exc_info())
        if error.brief and not (options.quiet and isinstance(error, ConnectionLost)):
            error.hint = _find_remedy(error) or error.hint
            _say(error.render("vsh"))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of --help or the like has closed our stdout.
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        return PIPE_BROKEN
    except Exception as error:
        if options.debug:
            sys.excepthook(*sys.exc_info())
        _say(_explain(error))
        return 1


def _settle_output() -> None:
    from vsh.patience import settle_output  # noqa: PLC0415 - as below

    settle_output()


def _explain(error: Exception) -> str:
    remedy = _find_remedy(error)
    if remedy:
        what = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        return f"vsh: {what}\nhint: {remedy}"
    return f"vsh: internal error: {type(error).__name__}: {error}\nhint: --debug shows where; please report it"


def _find_remedy(error: Exception) -> str:
    """Returns the remedy for a limit that caused `error`; empty for other failures."""
    try:
        from vsh.limits import find_remedy  # noqa: PLC0415 - only after a failure
    except OSError:
        # Too many files are open to read one more. What this program has open is of no use any more.
        os.closerange(3, CLOSED_MAX)
        from vsh.limits import find_remedy  # noqa: PLC0415

    return find_remedy(error)


def _say(text: str) -> None:
    """Prints in one write, so that lines of several programs do not mix. Ignores a reader that is gone."""
    data = (text + "\n").encode("utf-8", "surrogateescape")
    try:
        rest = data[os.write(2, data) :]
    except BlockingIOError:
        rest = data
    except OSError:
        return
    if rest:
        _say_patiently(rest)


def _say_patiently(data: bytes) -> None:
    from vsh.patience import write_patiently  # noqa: PLC0415 - few share a terminal with a program that spoils it

    try:
        write_patiently(2, data)
    except OSError:
        pass


def _apply_config(options: Options) -> None:
    if os.path.exists(find_config_path()):
        from vsh.config import apply_config  # noqa: PLC0415 - few have one

        apply_config(options)


def _print(text: str) -> int:
    """Prints an answer and returns the exit status. Raises BrokenPipeError now, not in the interpreter's last flush."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # The rest must not fail once more at the end.
        sys.stdout = None
        raise VshError(f"cannot write the answer: {error.strerror}") from error
    return 0


def _render_help(options: Options) -> str:
    """Returns the answer to a flag that needs no session: the launcher, the hosts, or a completion script."""
    from vsh import completion, config, launcher, registry  # noqa: PLC0415

    if options.launcher:
        return launcher.render_launcher()
    if options.list_hosts:
        names = {machine.name for machine in registry.read_machines()} | set(config.list_hosts())
        return "".join(f"{name}\n" for name in sorted(names))
    script = completion.render_completion(options.completion)
    if script is None:
        raise VshError(f"there is no completion for '{options.completion}'", hint="bash, zsh and fish", status=65)
    return script


if __name__ == "__main__":
    sys.exit(main())
