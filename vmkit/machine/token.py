"""A machine's token: made with the machine, kept in its directory, gone with it (docs/reference/protocol.md 2.9).

Nothing here returns it: vsh, and QEMU for the guest's firmware, read the file.
"""

import os
from pathlib import Path

from vmkit.errors import HostError
from vmkit.machine.launch import Layout
from vmkit.machine.spec import Backend
from vsh.token import make_token_text

# The word in machine.json and in `vmkit status`.
DEMANDED = "demanded"


def needs_token(backend: Backend, *, asked: bool) -> bool:
    """On vhost every user of the host can connect to the guest's ports; a UNIX socket keeps others out by itself."""
    return asked or backend is Backend.VHOST


def find_token_path(directory: Path) -> Path:
    """Where the token of the machine in `directory` is."""
    return directory / Layout.TOKEN


def make_token(directory: Path) -> None:
    """Writes a new token into a machine's directory, for its owner alone. Raises HostError."""
    path = find_token_path(directory)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123  (the descriptor was made with O_EXCL)
            # Whatever the umask has left of it.
            os.fchmod(fd, 0o600)
            file.write(make_token_text())
    except OSError as error:
        raise HostError(f"cannot write the machine's token {path}: {error.strerror}") from error
