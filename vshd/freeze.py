"""Whether this machine is frozen: made fit for a snapshot, and not thawed since. One small file says so.

A frozen machine serves nothing but a thaw, and only to a client that proves the freeze's secret. The file outlives the
daemon: one that pid 1 starts again is as frozen as the last, and knows the token that a thaw has brought. While there
is no file the machine was never frozen.
"""

import os
import stat

from vshd.wire.errors import TokenError

# `thawed vmkit.token:` and 64 digits.
STATE_BYTES_MAX = 256
FROZEN, THAWED, NO_TOKEN = b"frozen", b"thawed", b"none"


class FreezeState:
    """What the file says. token: what clients must prove; None: they need none."""

    __slots__ = ("is_frozen", "token")

    def __init__(self, token: bytes | None, *, is_frozen: bool) -> None:
        self.token = token
        self.is_frozen = is_frozen


def read_state(path: str) -> FreezeState | None:
    """The state of a machine that was frozen once; None for one that was not. Raises TokenError, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise TokenError(f"{path} is no file of this user's own, closed to everyone else")
        word, _, text = os.read(fd, STATE_BYTES_MAX).rstrip(b"\n").partition(b" ")
    finally:
        os.close(fd)
    if word == THAWED and text == NO_TOKEN:
        return FreezeState(None, is_frozen=False)
    if word not in (FROZEN, THAWED):
        raise TokenError(f"{path} holds no state of a frozen machine")
    # Only where there is a token.
    from vshd.wire.proof import parse_token  # noqa: PLC0415

    return FreezeState(parse_token(text), is_frozen=word == FROZEN)


def write_state(path: str, state: FreezeState) -> None:
    """Writes the file, whole, for this user alone. Raises OSError."""
    text = NO_TOKEN
    if state.token is not None:
        from vshd.wire.proof import render_token  # noqa: PLC0415  (see read_state)

        text = render_token(state.token)
    new = f"{path}.new"
    # A rest of a process that was killed here.
    try:
        os.unlink(new)
    except FileNotFoundError:
        pass
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, (FROZEN if state.is_frozen else THAWED) + b" " + text + b"\n")
    finally:
        os.close(fd)
    os.rename(new, path)
