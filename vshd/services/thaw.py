"""Makes a machine of its own of a guest that was restored from a snapshot (docs/reference/protocol.md 4).

The memory of every such guest is the same: random numbers, names, ids and the clock are the saved machine's. What the
request brings takes their place. Then the host sets the clock over the connection, as often as it needs to be sure of
the time that its words travel, and ends the freeze. Until that end a thaw can be tried again.
"""

import fcntl
import os
import select
import sys
import time

from vshd.freeze import FreezeState, write_state
from vshd.naming import is_name, take_name
from vshd.services.freeze import BOOT_ID_SUFFIX
from vshd.session.refusal import RefusalError
from vshd.wire import messages
from vshd.wire.requests import Thaw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup

TOKEN_BYTES = 32
ENTROPY_BYTES_MIN, ENTROPY_BYTES_MAX = 32, 512
ID_DIGITS = frozenset(b"0123456789abcdef")
MACHINE_ID_FILE = "/etc/machine-id"
# linux/random.h
RANDOM, RNDADDENTROPY, RNDRESEEDCRNG = "/dev/random", 0x40085203, 0x5207
# One time, in nanoseconds since 1970, little-endian; 0 is the end of the thaw.
WORD_BYTES = 8
TIME_NS_MAX = (1 << 63) - 1
EXCHANGES_MAX = 32
EXCHANGE_S = 10.0


class Guest:
    """The parts of this guest that a thaw changes: the real ones. Every method raises OSError."""

    __slots__ = ("_freeze_file",)

    def __init__(self, freeze_file: str) -> None:
        self._freeze_file = freeze_file

    def add_entropy(self, data: bytes) -> None:
        """Feeds the kernel's random numbers, and has the kernel use that at once."""
        fd = os.open(RANDOM, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # struct rand_pool_info: how many bits of it are random, how many bytes it has.
            head = b"".join(number.to_bytes(4, sys.byteorder) for number in (8 * len(data), len(data)))
            fcntl.ioctl(fd, RNDADDENTROPY, head + data)
            fcntl.ioctl(fd, RNDRESEEDCRNG)
        finally:
            os.close(fd)

    def set_name(self, name: bytes) -> None:
        take_name(name)

    def set_machine_id(self, digits: bytes) -> None:
        """Changes /etc/machine-id, where the image has one."""
        if os.path.exists(MACHINE_ID_FILE):
            _overwrite(MACHINE_ID_FILE, digits + b"\n")

    def set_boot_id(self, text: bytes) -> None:
        """Changes the file that the freeze has mounted over the kernel's."""
        _overwrite(self._freeze_file + BOOT_ID_SUFFIX, text + b"\n")

    def set_clock(self, time_ns: int) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)

    def end_freeze(self, token: bytes | None) -> None:
        write_state(self._freeze_file, FreezeState(token, is_frozen=False))


def user_of(_thaw: Thaw) -> bytes:
    """Root, as for the freeze."""
    return b"root"


def describe(_thaw: Thaw) -> str:
    """What the log calls it."""
    return "thaw"


def open_service(thaw: Thaw, _fd: int, around: "Surroundings") -> "Thawing":
    """Changes all but the clock. Raises RefusalError."""
    return prepare(thaw, Guest(around.options.freeze_file), around.renew, around.prove_wall)


def prepare(thaw: Thaw, guest: Guest, renew: "Callable[[], None]", prove_wall: "Callable[[], bytes]") -> "Thawing":
    """open_service() for a guest given. renew: has the server read the state again. Raises RefusalError."""
    fault = find_fault(thaw)
    if fault:
        raise RefusalError(f"a thaw with {fault}", messages.BAD_REQUEST)
    step = "add entropy"
    try:
        # First: ids that the guest makes from here on must be its own.
        guest.add_entropy(thaw.entropy)
        step = "set the hostname"
        guest.set_name(thaw.hostname)
        step = "set the machine-id"
        guest.set_machine_id(thaw.machine_id)
        step = "set the boot_id"
        guest.set_boot_id(thaw.boot_id)
    except OSError as error:
        raise RefusalError(f"cannot {step}: {error.strerror}", messages.OTHER, error=error.errno or 0) from error
    # One line: the client keeps a description free of control characters.
    return Thawing(guest, thaw.token or None, renew, prove_wall().rstrip(b"\n").replace(b"\n", b" "))


def find_fault(thaw: Thaw) -> str:
    """What is wrong with a thaw; empty when nothing is."""
    if not ENTROPY_BYTES_MIN <= len(thaw.entropy) <= ENTROPY_BYTES_MAX:
        return f"{len(thaw.entropy)} bytes of entropy"
    if not is_name(thaw.hostname):
        return "a hostname that no machine can have"
    if len(thaw.machine_id) != 32 or not ID_DIGITS.issuperset(thaw.machine_id):
        return "a machine-id that is none"
    parts = thaw.boot_id.split(b"-")
    if [len(part) for part in parts] != [8, 4, 4, 4, 12] or not ID_DIGITS.issuperset(b"".join(parts)):
        return "a boot_id that is none"
    if len(thaw.token) not in (0, TOKEN_BYTES):
        return "a token that is none"
    return ""


class Thawing:
    """The rest of a thaw, on its own connection: the clock, and the end of the freeze."""

    def __init__(self, guest: Guest, token: bytes | None, renew: "Callable[[], None]", description: bytes) -> None:
        self.description = description
        self._guest = guest
        self._token = token
        self._renew = renew

    def run(self, fd: int, rest: bytes, _wakeup: "Wakeup", _log: "Log") -> str:
        """Answers each time of the host with the guest's own, which it is then; 0 ends the freeze."""
        try:
            return self._exchange(fd, rest)
        except OSError as error:
            return f"not thawed: {error.strerror}"
        finally:
            os.close(fd)

    def _exchange(self, fd: int, rest: bytes) -> str:
        for _ in range(EXCHANGES_MAX):
            word = _read_word(fd, rest)
            rest = b""
            if word is None:
                return "not thawed: the host left, or sent no time"
            time_ns = int.from_bytes(word, "little")
            if time_ns > TIME_NS_MAX:
                return "not thawed: the host's time is none"
            if time_ns:
                self._guest.set_clock(time_ns)
                os.write(fd, time.time_ns().to_bytes(WORD_BYTES, "little"))
                continue
            self._guest.end_freeze(self._token)
            # Before the answer: the host's next connection meets a server that knows.
            self._renew()
            os.write(fd, bytes(WORD_BYTES))
            return "thawed"
        return "not thawed: the host sent too many times"


def _read_word(fd: int, data: bytes) -> bytes | None:
    """The next word; None when the host has left, is silent, or sent more than one. data: what was read before."""
    deadline_s = time.monotonic() + EXCHANGE_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(data) < WORD_BYTES:
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            return None
        try:
            piece = os.read(fd, WORD_BYTES + 1 - len(data))
        except BlockingIOError:
            continue
        if not piece:
            return None
        data += piece
    return data if len(data) == WORD_BYTES else None


def _overwrite(path: str, text: bytes) -> None:
    """Replaces the text of a file in place: what is mounted elsewhere stays mounted."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, text)
    finally:
        os.close(fd)
