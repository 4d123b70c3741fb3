"""Reports the TCP ports that this guest listens on, at once and after each change (docs/reference/protocol.md 3.6).

Runs in a session's process, as the session's user, in the network that its sessions have. Looks again and again: no
event says that a socket begins to listen. What a look costs decides how soon the next one comes.
"""

import os
import select
import time

from vshd.services.listeners import Looker, Seen, open_looker
from vshd.session.refusal import RefusalError
from vshd.signals import SIGINT, SIGTERM
from vshd.wire import messages
from vshd.wire.ports import encode_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Ports

# Between two looks: so that a port is seen within a second, but no more than this part of the processor's time.
PAUSE_S, PAUSE_MAX_S = 0.4, 5.0
SHARE_MAX = 0.002
# The cost of a look is the lowest of the last ones, which grow old by this: a busy host makes single ones dear.
AGEING = 1.1

ANY_IPV4, LOOPBACK_IPV4 = bytes(4), b"\x7f\0\0\1"
ANY_IPV6, LOOPBACK_IPV6 = bytes(16), bytes(15) + b"\1"
MAPPED_IPV4 = bytes(10) + b"\xff\xff"
# fe80::/10: of use only with the number of an interface.
LINK_LOCAL, LINK_LOCAL_MASK = 0xFE80, 0xFFC0

# How much of a command line tells whose process it is. In images a line of code is vshd's start.
COMMAND_SIZE = 512
OWN_WORDS = (b"from vshd.", b"\0-m\0vshd\0")


def user_of(ports: "Ports") -> bytes:
    """The user that the client asks for."""
    return ports.user


def describe(_ports: "Ports") -> str:
    """What the log calls it."""
    return "reports of listening ports"


def open_service(_ports: "Ports", _fd: int, _around: "Surroundings") -> "PortsService":
    """Finds out how to look. Raises RefusalError."""
    try:
        return PortsService(open_looker())
    except OSError as error:
        text = f"this guest does not tell what listens: {error.strerror}"
        raise RefusalError(text, messages.UNREACHABLE, error=error.errno or 0) from error


class PortsService:
    """Invariant: `_unsent` is the rest of one report; a newer one is made only once that is sent."""

    description = b""

    def __init__(self, looker: Looker) -> None:
        self._looker = looker
        self._unsent = b""
        self._reported: dict[int, bytes] | None = None
        # The sockets that were looked at: ours among them, and those of others.
        self._own: set[int] = set()
        self._others: set[int] = set()
        self._cost_s = 0.0

    def run(self, fd: int, _rest: bytes, wakeup: "Wakeup", log: "Log") -> str:
        """Reports until the client closes the connection."""
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(wakeup.fd, select.POLLIN)
        try:
            while True:
                self._report(fd)
                poll.register(fd, select.POLLIN | (select.POLLOUT if self._unsent else 0))
                # A client that takes no report gets the latest one once it does.
                ready = poll.poll(self._find_pause_s() * 1000)
                if any(found == wakeup.fd for found, _ in ready):
                    numbers = wakeup.take()
                    if SIGTERM in numbers or SIGINT in numbers:
                        return "ended"
                if any(found == fd and mask & ~select.POLLOUT for found, mask in ready):
                    # It has nothing to say: whatever there is to read is its end.
                    return "closed"
        except OSError as error:
            log.warning(f"reports of listening ports ended: {error.strerror}")
            return f"ended: {error.strerror}"
        finally:
            self._looker.close()
            os.close(fd)

    def _find_pause_s(self) -> float:
        return min(PAUSE_MAX_S, max(PAUSE_S, self._cost_s / SHARE_MAX))

    def _report(self, fd: int) -> None:
        """Looks, unless a report is under way, and sends what is to be sent. Raises OSError."""
        if not self._unsent:
            before_s = time.thread_time()
            listeners = self._looker.look()
            cost_s = time.thread_time() - before_s
            self._cost_s = min(cost_s, AGEING * self._cost_s) if self._reported is not None else cost_s
            self._forget_own(listeners)
            ports = choose_addresses(listener for listener in listeners if listener[2] not in self._own)
            if ports != self._reported:
                self._reported = ports
                self._unsent = encode_report(ports)
        if self._unsent:
            try:
                self._unsent = self._unsent[os.write(fd, self._unsent) :]
            except BlockingIOError:
                pass

    def _forget_own(self, listeners: list[Seen]) -> None:
        """Finds out which of the new sockets are vshd's: ports that it listens on for a client are that client's."""
        inodes = {inode for _, _, inode in listeners}
        self._own &= inodes
        self._others &= inodes
        new = inodes - self._own - self._others
        if new:
            own = find_own(new)
            self._own |= own
            self._others |= new - own


def choose_addresses(listeners: "Iterable[Seen]") -> dict[int, bytes]:
    """One address for each port, where a program of this guest best reaches it."""
    chosen: dict[int, tuple[int, bytes]] = {}
    for place, port, _ in listeners:
        address = place.removeprefix(MAPPED_IPV4)
        rank = _rank(address)
        if port and rank is not None and (port not in chosen or (rank, address) < chosen[port]):
            chosen[port] = rank, address
    return {port: address for port, (_, address) in chosen.items()}


def _rank(address: bytes) -> int | None:
    """How good an address is; None: of no use."""
    if address in (ANY_IPV4, LOOPBACK_IPV4):
        return 0
    if address in (ANY_IPV6, LOOPBACK_IPV6):
        return 1
    if len(address) == len(ANY_IPV4):
        return 2
    return None if int.from_bytes(address[:2], "big") & LINK_LOCAL_MASK == LINK_LOCAL else 3


def find_own(inodes: set[int], proc: str = "/proc") -> set[int]:
    """Which of these sockets a vshd has open, as far as this user may see."""
    own: set[int] = set()
    for name in os.listdir(proc):
        if name.isdigit() and is_own_process(f"{proc}/{name}"):
            own |= inodes & _find_sockets(f"{proc}/{name}/fd")
    return own


def is_own_process(folder: str) -> bool:
    """Whether this is a vshd: the server, a process of a session, or a mode of it."""
    try:
        fd = os.open(f"{folder}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        command = os.read(fd, COMMAND_SIZE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return any(word in command for word in OWN_WORDS)


def _find_sockets(folder: str) -> set[int]:
    inodes: set[int] = set()
    try:
        names = os.listdir(folder)
    except OSError:
        # It has ended, or is another user's.
        return inodes
    for name in names:
        try:
            kind, _, number = os.readlink(f"{folder}/{name}").partition(":[")
            if kind == "socket":
                inodes.add(int(number.rstrip("]")))
        except (OSError, ValueError):
            # It is closed by now.
            pass
    return inodes
