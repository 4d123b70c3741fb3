"""vsh's entry; the only place that prints errors and exits."""

import os
import sys

from vsh import cli
from vsh.errors import ConnectionLost, VshError
from vsh.flags import HELP, parse_flags
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


if __name__ == "__main__":
    sys.exit(main())
