"""A launcher for vsh that starts it faster than pip's console script: an interpreter without site and environment.

It names this interpreter and this installation, and so fits one computer only: vsh --launcher >~/bin/vsh.
"""

import os
import sys

# The kernel's limit for a script's first line (BINPRM_BUF_SIZE).
FIRST_LINE_MAX = 255


def render_launcher() -> str:
    """Returns the script. The user makes the file executable."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    first = f"#!{sys.executable} -IS"
    body = f"import sys\nsys.path.insert(0, {home!r})\nfrom vsh.__main__ import main\nsys.exit(main())\n"
    if len(first) <= FIRST_LINE_MAX and " " not in sys.executable:
        return f"{first}\n{body}"
    # Both a shell script and a Python one: the first lines are a string to Python.
    return f"#!/bin/sh\n'''exec' '{sys.executable}' -IS \"$0\" \"$@\"\n' '''\n{body}"
