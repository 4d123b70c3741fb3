"""Makes a guest fit for a snapshot (docs/reference/protocol.md 4): from here on vshd serves nothing but a thaw.

Runs as root. What a thaw would otherwise pay for in each restored guest is done here, once.
"""

import os

from vshd.freeze import FreezeState, write_state
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup, find_ignored
from vshd.wire import messages
from vshd.wire.requests import Freeze

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings

SECRET_BYTES = 32
BOOT_ID = "/proc/sys/kernel/random/boot_id"
BOOT_ID_SUFFIX = ".boot_id"


def user_of(_freeze: Freeze) -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_freeze: Freeze) -> str:
    """What the log calls it."""
    return "freeze"


def open_service(freeze: Freeze, _fd: int, around: "Surroundings") -> "Frozen":
    """Freezes the machine. Raises RefusalError, and then nothing has changed."""
    path = around.options.freeze_file
    if not path:
        raise RefusalError("this vshd was started without --freeze_file", messages.BAD_REQUEST)
    if len(freeze.secret) != SECRET_BYTES:
        raise RefusalError(f"a freeze needs a secret of {SECRET_BYTES} bytes", messages.BAD_REQUEST)
    try:
        cover_boot_id(path + BOOT_ID_SUFFIX)
        write_state(path, FreezeState(freeze.secret, is_frozen=True))
    except OSError as error:
        raise RefusalError(f"cannot freeze: {error.strerror}", messages.OTHER, error=error.errno or 0) from error
    around.renew()
    return Frozen()


class Frozen:
    """Done when it was opened."""

    description = b""

    def run(self, fd: int, _rest: bytes, _wakeup: Wakeup, _log: "Log") -> str:
        """Closes the connection."""
        os.close(fd)
        return "frozen"


def cover_boot_id(path: str) -> None:
    """Mounts a file of ours over the kernel's boot_id, which nothing else can change. Raises OSError.

    The thaw then only writes the file.
    """
    with open(BOOT_ID, "rb") as file:
        text = file.read(64)
    if os.path.exists(path):
        # A machine that was restored and is frozen again has it.
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
    try:
        os.fchmod(fd, 0o444)
        os.write(fd, text)
    finally:
        os.close(fd)
    pid = os.posix_spawnp("mount", ["mount", "-o", "bind", path, BOOT_ID], os.environ, setsigdef=find_ignored())
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        os.unlink(path)
        raise OSError(5, f"mount -o bind {path} {BOOT_ID} failed")
