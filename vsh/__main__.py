"""vsh's entry; the only place that prints errors and exits."""

import os
import sys

from vsh import cli
from vsh.errors import ConnectionLost, VshError
from vsh.flags import HELP, Options, find_config_path, parse_flags
from vshd.version import __version__

INTERRUPTED = 128 + 2


def main(argv: list[str] | None = None) -> int:
    """Runs vsh with `argv` (sys.argv's words by default) and returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    is_debug = "--debug" in words
    is_quiet = False
    try:
        options = parse_flags(words)
        is_debug, is_quiet = options.debug, options.quiet
        if options.help:
            print(HELP, end="")
            return 0
        if options.version:
            print(f"vsh {__version__}")
            return 0
        if options.completion or options.list_hosts or options.launcher:
            return _print_help(options)
        _apply_config(options)
        is_debug, is_quiet = options.debug, options.quiet
        return cli.run(options)
    except VshError as error:
        if is_debug:
            raise
        if error.brief and not (is_quiet and isinstance(error, ConnectionLost)):
            # One write: lines of several programs must not mix.
            os.write(2, (error.render("vsh") + "\n").encode("utf-8", "surrogateescape"))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED


def _apply_config(options: Options) -> None:
    if os.path.exists(find_config_path()):
        from vsh.config import apply_config  # noqa: PLC0415 - few have one

        apply_config(options)


def _print_help(options: Options) -> int:
    """What is asked for once, or by completion scripts: no session."""
    from vsh import completion, config, launcher, registry  # noqa: PLC0415

    if options.launcher:
        print(launcher.render_launcher(), end="")
        return 0
    if options.list_hosts:
        names = {machine.name for machine in registry.read_machines()} | set(config.list_hosts())
        print("\n".join(sorted(names)))
        return 0
    script = completion.render_completion(options.completion)
    if script is None:
        raise VshError(f"there is no completion for '{options.completion}'", hint="bash, zsh and fish", status=65)
    print(script, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
