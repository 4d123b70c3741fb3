"""The attacker: runs inside a guest and tries to reach its services over vsock without being the host.

    attacker.py boot DIRECTORY               from the boot hook: opens the services, tries to squat vshd's port
    attacker.py connect WHO PHASE CID PORT   tries every address, type and source; PORT is the host's ready port
    attacker.py flood WHO CID                many connections at once, to the host and to vshd, with nonsense
    attacker.py climb WHO                    tries the ways around (climber.py)
    attacker.py undo WHO                     root takes the layers away, then connects again

WHO is `user` (uid 1000), `root`, or `namespace`: uid 1000 that made itself root of namespaces of its own. PHASE names
what has been done to the guest before; CID is the guest's own (users may not be let ask /dev/vsock). One JSON line is
printed for each attempt. Standard library only, and of that only what the image tiny has: this file is copied into
guests as it is.
"""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.guest.wall.inside import sockaddr
else:
    import sockaddr

VSHD_PORT = 9001
# The suite's own services, which root of the guest offers to the host alone; each answers with a greeting.
STREAM_PORT, SEQPACKET_PORT, LOW_PORT = 5000, 5001, 900
GREETING = b"wall"
# SetupConnectionRequest: /vm_shell, user root, argv ["id"], no pty (docs/reference/protocol.md 1.2).
HELLO = bytes.fromhex("170000000a092f766d5f7368656c6c1204726f6f742a0269644001")
READY_STATUS, FAILED_STATUS = b"\x08\x01", b"\x08\x03"
# Field 2 of HostMessage: a status after a first frame that was no request.
STATUS_MESSAGE = 0x12

HOST_CID, ANY_CID = 2, 0xFFFFFFFF
USER_ID = 1000
# Sources of one's own choice start here; every attempt has another.
LOW_SOURCE, HIGH_SOURCE = 300, 4_000_000_000
# The kernel gives a connect up after 2 s; an answer of vshd takes a fork, in emulation within emulation at worst.
DEADLINE_S = 60.0
# Connections of a flood: to a port of the host where nobody listens, and to vshd.
FLOOD_OF_HOST, FLOOD_OF_VSHD = 1500, 200
# Descriptors open at once.
BATCH = 120

SOURCES = ("auto", "low", "high")
TYPES = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET, "datagram": socket.SOCK_DGRAM}


class Attempt:
    """One attempt; `result` is an errno's name or one of: served, connected, refused, closed, silent, bound."""

    def __init__(self, name: str, kind: str, cid: int | str, port: int, source: str = "auto") -> None:
        self.name = name
        self.kind = kind
        self.cid = cid
        self.port = port
        self.source = source
        self.result = ""
        self.began_s = time.monotonic()
        self.seconds = 0.0

    def end(self, result: str) -> None:
        self.result = result
        self.seconds = round(time.monotonic() - self.began_s, 3)

    def say(self, who: str, phase: str) -> None:
        line = {"attempt": self.name, "who": who, "uid": os.getuid(), "phase": phase, "type": self.kind}
        line |= {"cid": self.cid, "port": self.port, "source": self.source}
        print(json.dumps(line | {"result": self.result, "seconds": self.seconds}), flush=True)


def name_errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))


def find_own_cid() -> int:
    """IOCTL_VM_SOCKETS_GET_LOCAL_CID of <linux/vm_sockets.h>."""
    with open("/dev/vsock", "rb") as device:
        return int(struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))[0])


def plan_connects(own: int, ready_port: int) -> list[Attempt]:
    """Every CID, port, type and source of the suite. Datagram sockets are refused before an address is looked at."""
    cids = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "own": own, "any": ANY_CID}
    ports = (VSHD_PORT, ready_port, STREAM_PORT, SEQPACKET_PORT, LOW_PORT)
    attempts = [
        Attempt("connect", kind, label, port, source)
        for label in cids
        for port in ports
        for kind in ("stream", "seqpacket")
        for source in SOURCES
    ]
    attempts += [Attempt("connect", "datagram", label, VSHD_PORT) for label in cids]
    for name in sockaddr.WAYS:
        attempts += [Attempt(name, "stream", label, VSHD_PORT) for label in ("1", "own")]
    return attempts


def resolve(label: int | str, own: int) -> int:
    return own if label == "own" else ANY_CID if label == "any" else int(label)


class Volley:
    """Many attempts at once: each opens, waits for the connection, says hello, and waits for a word."""

    def __init__(self, own: int, hello: bytes = HELLO) -> None:
        self._own = own
        self._hello = hello
        self._poll = select.poll()
        self._pending: dict[int, tuple[socket.socket, Attempt]] = {}
        self._is_said: set[int] = set()
        self._sources = {"low": LOW_SOURCE, "high": HIGH_SOURCE}

    def run(self, attempts: list[Attempt]) -> None:
        for start in range(0, len(attempts), BATCH):
            for attempt in attempts[start : start + BATCH]:
                self._open(attempt)
            self._wait()

    def _open(self, attempt: Attempt) -> None:
        attempt.began_s = time.monotonic()
        try:
            connection = socket.socket(socket.AF_VSOCK, TYPES[attempt.kind])
        except OSError as error:
            attempt.end(name_errno(error.errno or 0))
            return
        try:
            self._start(attempt, connection)
        except OSError as error:
            connection.close()
            attempt.end(name_errno(error.errno or 0))

    def _start(self, attempt: Attempt, connection: socket.socket) -> None:
        if attempt.source != "auto":
            self._sources[attempt.source] += 1
            connection.bind((ANY_CID, self._sources[attempt.source]))
        connection.setblocking(False)
        cid = resolve(attempt.cid, self._own)
        if attempt.name in ("connect", "flood"):
            number = connection.connect_ex((cid, attempt.port))
        else:
            number = sockaddr.WAYS[attempt.name](connection, cid, attempt.port)
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, "")
        self._pending[connection.fileno()] = (connection, attempt)
        self._poll.register(connection, select.POLLOUT)

    def _wait(self) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while self._pending and (left_s := deadline_s - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left_s * 1000):
                if result := self._advance(fd):
                    self._finish(fd, result)
        for fd in list(self._pending):
            self._finish(fd, "silent")

    def _advance(self, fd: int) -> str:
        """One step of one attempt; its result when that was the last."""
        connection = self._pending[fd][0]
        if fd not in self._is_said:
            number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                return name_errno(number)
            self._is_said.add(fd)
            self._poll.modify(fd, select.POLLIN)
            try:
                connection.send(self._hello)
            except OSError:
                return "closed"
            return ""
        try:
            return judge(connection.recv(4096))
        except BlockingIOError:
            return ""
        except OSError:
            return "closed"

    def _finish(self, fd: int, result: str) -> None:
        connection, attempt = self._pending.pop(fd)
        self._is_said.discard(fd)
        self._poll.unregister(fd)
        connection.close()
        attempt.end(result)


def judge(answer: bytes) -> str:
    """What the first bytes of the other side mean."""
    if not answer:
        return "closed"
    if answer.startswith(GREETING):
        return "connected"
    start = 6 if answer[4:5] == bytes([STATUS_MESSAGE]) else 4
    return {READY_STATUS: "served", FAILED_STATUS: "refused"}.get(answer[start : start + 2], "answered")


def try_binds(own: int) -> list[Attempt]:
    """Squatting: vshd's port, by every address that could be one's own, and the privileged source of a READY."""
    attempts = [
        Attempt("bind", kind, cid, VSHD_PORT) for kind in ("stream", "seqpacket") for cid in ("any", "own", "1")
    ]
    attempts.append(Attempt("bind", "datagram", "any", VSHD_PORT))
    attempts.append(Attempt("bind", "stream", "any", 77))
    for attempt in attempts:
        attempt.began_s = time.monotonic()
        try:
            with socket.socket(socket.AF_VSOCK, TYPES[attempt.kind]) as squatter:
                squatter.bind((resolve(attempt.cid, own), attempt.port))
                squatter.listen()
            attempt.end("bound")
        except OSError as error:
            attempt.end(name_errno(error.errno or 0))
    return attempts


def flood(own: int) -> list[Attempt]:
    attempts = [Attempt("flood", "stream", "2", 4) for _ in range(FLOOD_OF_HOST)]
    attempts += [Attempt("flood", "stream", "own", VSHD_PORT) for _ in range(FLOOD_OF_VSHD)]
    Volley(own, b"\xff" * 4000).run(attempts)
    return attempts


def boot(directory: str) -> None:
    """The hook's part: services of root, and a user that is there before vshd."""
    os.makedirs(directory, exist_ok=True)
    listeners = []
    for kind, port in (("stream", STREAM_PORT), ("seqpacket", SEQPACKET_PORT), ("stream", LOW_PORT)):
        listener = socket.socket(socket.AF_VSOCK, TYPES[kind])
        listener.bind((ANY_CID, port))
        listener.listen(1024)
        listeners.append(listener)
    own = find_own_cid()
    pid = os.fork()
    if pid == 0:
        log = os.open(os.path.join(directory, "squat.jsonl"), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        become_user()
        for attempt in try_binds(own):
            attempt.say("user", "boot")
        os._exit(0)
    os.waitpid(pid, 0)
    if os.fork() == 0:
        os.setsid()
        serve(listeners)


def serve(listeners: list[socket.socket]) -> None:
    """Greets whoever connects, for ever. A greeting that nobody reads is dropped."""
    poll = select.poll()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for listener in listeners:
        poll.register(listener, select.POLLIN)
    by_fd = {listener.fileno(): listener for listener in listeners}
    while True:
        for fd, _ in poll.poll():
            try:
                connection, _ = by_fd[fd].accept()
                with connection:
                    connection.send(GREETING)
                    # A close before the hello has come is a reset, which could overtake the greeting. On a busy host
                    # a client has taken more than two seconds from its connect to its hello.
                    connection.settimeout(DEADLINE_S / 2)
                    connection.recv(4096)
            except OSError:
                pass


def become_user() -> None:
    os.setgroups([])
    os.setresgid(USER_ID, USER_ID, USER_ID)
    os.setresuid(USER_ID, USER_ID, USER_ID)


def become(who: str) -> None:
    if who != "root" and os.getuid() == 0:
        become_user()
    if who == "namespace":
        sockaddr.enter_namespaces()


def main() -> int:
    order, *words = sys.argv[1:]
    if order == "boot":
        boot(words[0])
        return 0
    who = words[0]
    become(who)
    if order == "connect":
        phase, own, ready_port = words[1], int(words[2]), int(words[3])
        attempts = plan_connects(own, ready_port)
        Volley(own).run(attempts)
        attempts += try_binds(own)
    elif order == "flood":
        phase, attempts = order, flood(int(words[1]))
    else:
        if TYPE_CHECKING:
            from tests.guest.wall.inside import climber  # noqa: PLC0415  (for its types alone)
        else:
            import climber  # noqa: PLC0415  (not every order needs it, and a start under emulation costs)

        phase = order
        attempts = climber.ORDERS[order](who)
    for attempt in attempts:
        attempt.say(who, phase)
    return 0


if __name__ == "__main__":
    sys.exit(main())
