"""Reads a machine's token from vmkit's file. Refuses a file that another user could have read or made.

Imported only for machines that demand a token.
"""

import errno
import os
import stat

from vsh.errors import VshError
from vshd.wire.errors import TokenError
from vshd.wire.proof import CLIENT, NONCE_BYTES, TOKEN_BYTES, TOKEN_TEXT_BYTES, Proof, parse_token, render_token


def make_token_text() -> bytes:
    """Returns a new token in the form of a token file."""
    return render_token(os.urandom(TOKEN_BYTES))


def make_proof(path: str) -> Proof:
    """Makes our proof for one connection to the machine whose token is in the file `path`. Raises VshError."""
    return Proof(CLIENT, read_token(path), os.urandom(NONCE_BYTES))


def read_token(path: str) -> bytes:
    """Returns the token in the file `path`. Raises VshError, which never quotes the token."""
    try:
        # A FIFO must not hold us up, and a symbolic link not lead elsewhere.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise VshError(f"the token file {path} is a symbolic link", hint="name the file itself") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise VshError(f"cannot read the token file {path}: {reason}") from error
    try:
        _check(path, os.fstat(fd))
        # With room for a newline, and for one byte too many.
        text = os.read(fd, TOKEN_TEXT_BYTES + 2)
    finally:
        os.close(fd)
    try:
        return parse_token(text)
    except TokenError as error:
        raise VshError(
            f"the token file {path} holds no token", details=str(error), hint="name the file that vmkit up wrote"
        ) from error


def _check(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise VshError(f"the token file {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise VshError(
            f"the token file {path} belongs to uid {status.st_uid}, not to you",
            hint="run vsh as the user who ran vmkit up",
        )
    if status.st_mode & 0o077:
        raise VshError(
            f"other users have access to the token file {path}: mode {stat.S_IMODE(status.st_mode):04o}",
            hint=f"a user who has read it can use the machine: start a new one; to keep this one: chmod 600 {path}",
        )
