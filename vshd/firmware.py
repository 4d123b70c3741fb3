"""Finds the token: in the firmware's tables, which root alone can read, in a file, or on standard input.

vmkit gives the token to QEMU as an OEM string (SMBIOS type 11; the layout is DMTF DSP0134, 6.1 and 7.12). The kernel
shows the tables as they are.
"""

import os
import select
import stat
import time

from vshd.flags import Options
from vshd.wire.errors import TokenError

DMI_TABLE = "/sys/firmware/dmi/tables/DMI"
# A VM's tables are half a KiB; the specification's first version counts their bytes in 16 bits.
TABLE_BYTES_MAX = 1 << 16
OEM_STRINGS = 11
END_OF_TABLE = 127
HEADER_BYTES = 4
# What wire.proof calls TOKEN_PREFIX; where there is none, that module is not needed.
PREFIX = b"vmkit.token:"
FILE_PREFIX = "file:"
FILE_BYTES_MAX = 256
# The program that starts vshd has the token ready.
STDIN_WAIT_S = 10.0


def find_token(source: str, *, is_vsock: bool, wait_s: float = STDIN_WAIT_S) -> bytes | None:
    """Returns the token that clients must prove; None: they need none. Raises TokenError, OSError.

    source: the value of --token_from. is_vsock: others than the socket's owner may connect. wait_s: limit for stdin.
    """
    if source == "none" or (source == "auto" and not is_vsock):
        return None
    if source == "stdin":
        return _parse(_read_stdin(wait_s))
    if source.startswith(FILE_PREFIX):
        return _parse(_read_own_file(source.removeprefix(FILE_PREFIX)))
    if source not in ("auto", "smbios"):
        raise TokenError("--token_from must be auto, smbios, none, stdin or file:PATH")
    try:
        table = _read_all(os.open(DMI_TABLE, os.O_RDONLY | os.O_CLOEXEC), TABLE_BYTES_MAX)
    except (FileNotFoundError, PermissionError) as error:
        if source == "auto":
            return None
        raise TokenError(f"cannot read the machine's token: {DMI_TABLE}: {error.strerror}") from error
    found = [text for text in read_oem_strings(table) if text.startswith(PREFIX)]
    if len(found) > 1:
        raise TokenError("the firmware holds several tokens")
    if not found and source == "smbios":
        raise TokenError("the firmware holds no token, and --token_from=smbios needs one")
    return _parse(found[0]) if found else None


def check_provable(token: bytes | None, options: Options) -> None:
    """Raises TokenError when these options would refuse every client."""
    if token is not None and not options.extended and not options.allow_legacy_clients:
        raise TokenError("with --noextended no client can prove the token")


def read_oem_strings(table: bytes) -> list[bytes]:
    """Returns the strings of every type 11 structure. It reads a table that ends early up to its end."""
    found: list[bytes] = []
    position = 0
    while position + HEADER_BYTES <= len(table):
        kind, size = table[position], table[position + 1]
        if kind == END_OF_TABLE or size < HEADER_BYTES:
            break
        # Behind the formatted part: strings, each with its NUL, and one NUL more; two where there are none.
        start = position + size
        end = table.find(b"\0\0", start)
        if end < 0:
            break
        if kind == OEM_STRINGS:
            found += [text for text in table[start:end].split(b"\0") if text]
        position = end + 2
    return found


def _parse(text: bytes) -> bytes:
    from vshd.wire.proof import parse_token  # noqa: PLC0415 - few machines have one

    return parse_token(text)


def _read_own_file(path: str) -> bytes:
    """Reads a file of this user. Raises TokenError for one that another user could have read or written."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise TokenError(f"{path} must be a file of this user's own, closed to everyone else (mode 0600)")
    return _read_all(fd, FILE_BYTES_MAX)


def _read_stdin(wait_s: float) -> bytes:
    """Reads one line, or up to the end. Then closes stdin, so that no child can read a rest of the token."""
    deadline_s = time.monotonic() + wait_s
    poll = select.poll()
    poll.register(0, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise TokenError(f"no token came on standard input within {wait_s:g} s")
        piece = os.read(0, FILE_BYTES_MAX + 1 - len(data))
        if not piece:
            break
        data += piece
        if len(data) > FILE_BYTES_MAX:
            raise TokenError(f"the file or input with the token is larger than {FILE_BYTES_MAX} bytes")
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    return data


def _read_all(fd: int, limit: int) -> bytes:
    """Reads up to the end and closes the descriptor. Raises TokenError for more than `limit` bytes."""
    data = b""
    try:
        while piece := os.read(fd, limit + 1 - len(data)):
            data += piece
            if len(data) > limit:
                raise TokenError(f"the file or input with the token is larger than {limit} bytes")
    finally:
        os.close(fd)
    return data
