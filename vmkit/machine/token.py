"""A machine's token: made with the machine, kept in its directory, gone with it (docs/reference/protocol.md 2.9).

Nothing here returns it: vsh, and QEMU for the guest's firmware, read the file. A guest without such firmware has it in
an initramfs of its own.
"""

import os
from pathlib import Path

from vmkit.errors import HostError
from vmkit.machine.launch import Layout
from vmkit.machine.spec import Backend
from vsh.token import make_token_text

# In the initramfs. Its folder is there.
TOKEN_PATH = "etc/vmkit/token"  # noqa: S105  (a file's name)
_COPY_BYTES = 1 << 20
# The word in machine.json and in `vmkit status`.
DEMANDED = "demanded"


def needs_token(backend: Backend, *, asked: bool) -> bool:
    """On vhost every user of the host can connect to the guest's ports; a UNIX socket keeps others out by itself."""
    return asked or backend is Backend.VHOST


def find_token_path(directory: Path) -> Path:
    """Where the token of the machine in `directory` is."""
    return directory / Layout.TOKEN


def find_initrd_path(directory: Path) -> Path:
    """Where the initramfs of the machine in `directory` is, if it has one of its own."""
    return directory / Layout.INITRD


def append_token(directory: Path, initrd: Path) -> None:
    """Writes the machine's own initramfs: the image's, and the token behind it, for root alone. Raises HostError.

    The kernel unpacks archives that follow each other (Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    # Only machines of other architectures that demand a token have one.
    from vmkit.image.formats.cpio import render_cpio  # noqa: PLC0415
    from vmkit.image.formats.tree import Tree, file_node  # noqa: PLC0415

    tree = Tree(merged=False)
    tree.add(TOKEN_PATH, file_node(find_token_path(directory).read_bytes(), 0o600))
    path = find_initrd_path(directory)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file, initrd.open("rb") as source:  # noqa: PTH123  (see make_token)
            os.fchmod(fd, 0o600)
            while data := source.read(_COPY_BYTES):
                file.write(data)
            # An archive begins at a multiple of four bytes.
            file.write(bytes(-file.tell() % 4) + render_cpio(tree))
    except OSError as error:
        raise HostError(f"cannot write the machine's initramfs {path}: {error.strerror}") from error


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
