"""The protocol of vsock_guest_exec: commands that a host sends to a guest, and the address where the guest gets them.

Source: the README of vsock_guest_exec. A command is at most 2,048 bytes. One that is disposable is sent as it is, and
the guest leaves after it. For a persistent guest each command follows its length: two bytes, little-endian.
"""

HOST_CID, DEFAULT_PORT = 2, 1024
COMMAND_BYTES_MAX = 2048
LENGTH_BYTES = 2
# linux/vm_sockets.h: VMADDR_CID_LOCAL, and the highest number, VMADDR_CID_ANY and VMADDR_PORT_ANY.
LOCAL_CID, ANY = 1, (1 << 32) - 1


class BadCommandError(ValueError):
    """A command that no guest runs: it is too long, empty, or has a NUL byte."""


def parse_host(text: str) -> tuple[int, int]:
    """The CID and the port of `CID:PORT`. A part that is missing or no number is the default: the host's 2, and 1024.

    -1 (any) and 1 stand for the host, too: a guest has no other, and its own loopback is no host.
    """
    cid, _, port = text.partition(":")
    number = _parse(cid, HOST_CID)
    return HOST_CID if number in (LOCAL_CID, ANY) else number, _parse(port, DEFAULT_PORT)


def _parse(text: str, default: int) -> int:
    text = text.strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(ANY)) and int(text) < ANY
    return int(text) if is_number else default


def encode_command(command: bytes, *, is_persistent: bool) -> bytes:
    """What a host sends for a command. Raises BadCommandError."""
    check_command(command)
    return (len(command).to_bytes(LENGTH_BYTES, "little") if is_persistent else b"") + command


def check_command(command: bytes) -> None:
    """Raises BadCommandError."""
    if not command:
        raise BadCommandError("the command is empty")
    if len(command) > COMMAND_BYTES_MAX:
        raise BadCommandError(f"a command is at most {COMMAND_BYTES_MAX} bytes long, not {len(command)}")
    if b"\0" in command:
        raise BadCommandError("a command must not have a NUL byte")


class CommandReader:
    """A persistent guest's side. Invariant: it holds less than one whole command."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = b""

    @property
    def is_between(self) -> bool:
        """Whether no part of a command waits for the rest."""
        return not self._data

    def receive_data(self, data: bytes) -> list[bytes]:
        """The commands that are whole now. Raises BadCommandError."""
        commands = []
        self._data += data
        while len(self._data) >= LENGTH_BYTES:
            size = int.from_bytes(self._data[:LENGTH_BYTES], "little")
            if size > COMMAND_BYTES_MAX:
                raise BadCommandError(f"a command is at most {COMMAND_BYTES_MAX} bytes long, not {size}")
            end = LENGTH_BYTES + size
            if len(self._data) < end:
                break
            command, self._data = self._data[LENGTH_BYTES:end], self._data[end:]
            check_command(command)
            commands.append(command)
        return commands
