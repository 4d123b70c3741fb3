"""ssh's ProxyCommand for a machine: with NAME PORT FOLDER USER it passes ssh a connection to the guest's sshd.

A machine that started after the last connection gets the keys of its name first. Every other connection only checks
four files, and imports no more modules.
"""

import os
import sys

from vmkit.ssh.mark import find_mark, is_current
from vsh.__main__ import main as run_vsh
from vsh.registry import MACHINES, find_runtime_directory
from vshd.carry.inherited import OF_PEOPLE, settle_signals


def main(argv: list[str] | None = None) -> int:
    """Runs to the end of the proxy; returns its exit status."""
    settle_signals(OF_PEOPLE)
    name, port, folder, user = sys.argv[1:] if argv is None else argv
    try:
        directory = os.path.join(find_runtime_directory(), MACHINES, name)  # noqa: PTH118  (pathlib is slow to import)
        if "/" in user or not is_current(find_mark(directory, user), folder):
            _prepare(name, folder, user)
    except Exception as error:
        return _report(error)
    return run_vsh([f"--vm_name={name}", f"--proxy=vsock:{port}", "--fdpass"])


def _prepare(name: str, folder: str, user: str) -> None:
    from pathlib import Path  # noqa: PLC0415  (most connections do not need it)

    from vmkit.ssh.access import exchange_keys, plan_access  # noqa: PLC0415
    from vsh.registry import find_machine  # noqa: PLC0415

    entry = find_machine(name=name)
    # Without a machine, vsh reports that and how the last one ended.
    if entry is not None:
        exchange_keys(entry, plan_access(entry, user=user, folder=Path(folder)))


def _report(error: Exception) -> int:
    """Prints an error to stderr, which ssh shows. stdout is ssh's socket."""
    from vsh.errors import VshError  # noqa: PLC0415

    shown = error if isinstance(error, VshError) else VshError(f"{type(error).__name__}: {error}")
    print(shown.render("vmkit ssh"), file=sys.stderr)
    return shown.status


if __name__ == "__main__":
    sys.exit(main())
