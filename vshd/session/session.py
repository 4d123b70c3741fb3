"""One session in a process of its own, from the first byte of the client to the target's exit.

Owns the order of things: handshake, account, directory, program, relay, end. Runs as root until the account is known
and then as that account, for good. Only a process that never became another user's can serve a second session.
"""

import gc
import os
import select
import time

from vshd.carry.conduit import write_output
from vshd.flags import Options
from vshd.log import Log
from vshd.processes import Exit, end_session, reap
from vshd.services.table import Surroundings, find_service
from vshd.session import audit
from vshd.session.account import Account, choose_account, is_own, switch_to
from vshd.session.limits import apply_limits, has_limits
from vshd.session.refusal import RefusalError
from vshd.session.relay import Relay
from vshd.session.target import Target, build_environment, enter_directory, start_target
from vshd.signals import SIGTERM, Wakeup
from vshd.wire import messages
from vshd.wire.buffers import FIRST_SIZE
from vshd.wire.connection import SILENCE_MS_MAX, default_limits
from vshd.wire.events import Broken, Distrusted, RequestReceived
from vshd.wire.messages import Extended, Failure, SetupConnectionRequest
from vshd.wire.server import ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vshd.services.table import Asked
    from vshd.wire.proof import Proof

# Handshake messages are small; a deferred request comes in as many reads as it needs.
RECEIVE_SIZE = 1 << 13
# `CONNECT 4294967295\n` has 19 bytes.
CONNECT_LINE_MAX = 32
# A refusal waits this long for a client that does not read.
LAST_WORDS_S = 10.0

# Beginnings of a peer's name, as the listener gives them.
HOST_PEERS = ("vsock 2:", "unix")

# In place of a target's pid: all is told to the client, and this process can serve another.
ENDED = -3
# A process that has carried more bytes ends: the buffers of bulk leave holes in its memory, up to 5 MiB, and the next
# session may take days. The fork for the next one is small beside the bulk.
CARRIED_MAX = 1 << 20

EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126


class HandshakeError(Exception):
    """The client did not say, in time or intelligibly, what it wants."""


class Session:
    """Invariant: `fd` is non-blocking and the only connection of this process."""

    def __init__(
        self,
        fd: int,
        who: str,
        options: Options,
        log: Log,
        wakeup: Wakeup,
        on_start: "Callable[[int], None] | None" = None,
        token: bytes | None = None,
        around: Surroundings | None = None,
    ) -> None:
        """who: the peer, for the log. wakeup: has SIGCHLD and SIGTERM. token: what the client must prove to know.
        around: of the server; None: there is none.

        on_start is told 0 when the token was proven, and later the pid of the target, or of this process if it
        forwards; and in the end ENDED, if run() returns True.
        """
        os.set_blocking(fd, False)
        self.fd = fd
        self.who = who
        self.options = options
        self.log = log
        self.wakeup = wakeup
        self._on_start = on_start
        # The process is the user that it was, without new limits.
        self._stays_own = False
        self.around = around or Surroundings(options, is_frozen=False, facts=b"", renew=lambda: None)
        self.connection = ServerConnection(
            make_limits(options),
            _make_proof(token),
            allow_legacy_clients=options.allow_legacy_clients and not self.around.is_frozen,
        )

    def run(self) -> bool:
        """The whole session; what goes wrong is told to the client, else to the log. Returns whether this process is
        as it was before, with nothing open: it can serve another.
        """
        try:
            request = self._receive_request()
        except HandshakeError as error:
            self.log.warning(f"{self.who}: {error}")
            return False
        if self.connection.proof is not None and self._on_start is not None:
            # It is no stranger: the server keeps it when it needs room.
            self._on_start(0)
        # Nothing that runs as the session's user knows the token.
        self.connection.proof = None
        service = find_service(request)
        if service is not None:
            request.user = service.user
        command = service.describe() if service is not None else _describe(request)
        try:
            prepared = self._prepare(request, service, command)
        except RefusalError as refusal:
            self._refuse(request, refusal)
            self.log.info(audit.render_refusal(self.who, command, refusal.description))
            return False
        if prepared is None:
            return False
        target, notice = prepared
        if self._on_start is not None:
            self._on_start(target.pid)
        started_s = time.monotonic()
        self.connection.accept(target.pid)
        if notice:
            self._say(request, notice)
        relay = self._relay(target)
        carried = sum(relay.running.count)
        is_whole = self._stays_own and not relay.lost and not relay.undelivered and carried <= CARRIED_MAX
        if is_whole and self._on_start is not None:
            # Now, since the client may be back before the rest is done.
            self._on_start(ENDED)
        reap(target.pid)
        end: Exit | str = relay.lost or relay.exit or Exit(0)
        if relay.undelivered:
            end = f"{relay.exit}, not all of it sent ({relay.undelivered}),"
        self._log_end(end, command, started_s, relay.running.count)
        if is_whole:
            del relay
            self._tidy_up(carried)
        return is_whole

    def _tidy_up(self, carried: int) -> None:
        """Makes this process fit for another session. carried: how many bytes this one had. Raises OSError."""
        os.close(self.fd)
        # No file system is kept busy.
        os.chdir("/")
        if self.around.root is not None:
            self.around.root.leave()
        if carried >= FIRST_SIZE:
            # Its larger buffers are in cycles, and Python looks for those after many sessions only.
            gc.collect()

    def _prepare(
        self, request: SetupConnectionRequest, service: "Asked | None", command: str
    ) -> tuple[Target, str] | None:
        """Becomes the user and starts the target; with a word to the client about it. None: a service had the
        connection, and is done with it. Raises RefusalError.
        """
        self._check_state(service)
        self._enter_root(service)
        account = choose_account(request, self.options)
        self.who = f"{self.who} user {account.name}"
        self._stays_own = service is None and is_own(account) and not has_limits(self.options, account)
        if not self._stays_own:
            self.around.forget()
        if service is not None and service.service.is_own:
            started_s = time.monotonic()
            self._log_end(service.serve(self, account), command, started_s)
            return None
        apply_limits(self.options, account)
        if self.options.allow_to_switch_user:
            switch_to(account)
        if service is not None:
            self.around.home = account.home
            self._hand_over(service, command)
            return None
        notice = self._enter_directory(request, account)
        environment = build_environment(request, account, inherit=self.options.inherit_env)
        return start_target(request, account, environment), notice

    def _enter_root(self, service: "Asked | None") -> None:
        """The root of sessions becomes this process's, where it is another. Raises RefusalError."""
        root = self.around.root
        if root is None or (service is not None and service.service.is_outside):
            return
        try:
            root.enter(() if service is None else service.service.later)
        except OSError as error:
            reason = f"could not enter the root of sessions: {error.strerror}"
            raise RefusalError(reason, messages.OTHER, error=error.errno or 0) from error

    def _check_state(self, service: "Asked | None") -> None:
        """A frozen machine serves its thaw alone, and some services are the host's alone. Raises RefusalError."""
        row = None if service is None else service.service
        if self.around.is_frozen and (row is None or not row.is_thaw):
            raise RefusalError("this machine is frozen: it was saved, and not thawed yet", messages.FROZEN)
        if row is not None and row.is_thaw and not self.around.is_frozen:
            raise RefusalError("this machine is not frozen", messages.BAD_REQUEST)
        if row is not None and row.is_hosts and not self.who.startswith(HOST_PEERS):
            raise RefusalError("only the host may ask for this service", messages.BAD_REQUEST)

    def _hand_over(self, service: "Asked", command: str) -> None:
        """The connection becomes a service's: the one way in which a session is handed over. Raises RefusalError."""
        if not self.connection.is_extended:
            raise RefusalError("a service needs extended mode", messages.BAD_REQUEST)
        handed = service.open(self.fd, self.around)
        self.connection.hand_over(os.getpid(), handed.description)
        if self._on_start is not None:
            self._on_start(os.getpid())
        if not _flush(self.fd, self.connection, LAST_WORDS_S):
            return
        started_s = time.monotonic()
        end = handed.run(self.fd, self.connection.take_rest(), self.wakeup, self.log)
        self._log_end(end, command, started_s)

    def _log_end(self, end: object, command: str, started_s: float, count: tuple[int, int] | None = None) -> None:
        seconds = time.monotonic() - started_s
        self.log.info(audit.render_end(self.who, end, command, seconds=seconds, count=count))

    def hand_over(self, description: bytes) -> None:
        """Answers READY for a service that does the rest itself, with send()."""
        self.connection.hand_over(os.getpid(), description)
        _flush(self.fd, self.connection, LAST_WORDS_S)

    def send(self, data: bytes) -> None:
        """Sends what a service has to say, as long as the client takes some of it every LAST_WORDS_S seconds."""
        self.connection.output.append(data)
        _flush(self.fd, self.connection, LAST_WORDS_S)

    def _relay(self, target: Target) -> Relay:
        """Relays to the end. The target is not reaped yet."""
        relay = Relay(self.fd, self.connection, target, self.wakeup)
        relay.run()
        if relay.lost:
            _flush(self.fd, self.connection, 0)
            os.close(self.fd)
        relay.close()
        if relay.lost:
            end_session(target.pid, has_terminal=target.has_pty)
        return relay

    # The handshake.

    def _receive_request(self) -> SetupConnectionRequest:
        """The client's request, whole. Raises HandshakeError."""
        deadline_s = time.monotonic() + self.options.handshake_timeout
        data = self._take_connect_line(deadline_s)
        while True:
            for event in self.connection.receive_data(data):
                if isinstance(event, RequestReceived):
                    return event.request
                if isinstance(event, Broken):
                    self.connection.send_failure(event.reason, Failure(messages.PROTOCOL))
                    _flush(self.fd, self.connection, 0)
                    raise HandshakeError(event.reason)
                if isinstance(event, Distrusted):
                    _flush(self.fd, self.connection, LAST_WORDS_S)
                    raise HandshakeError(f"refused: {event.reason}")
            # A deferred request is answered with "go on", or refused for its size.
            if not _flush(self.fd, self.connection, max(0.0, deadline_s - time.monotonic())):
                raise HandshakeError("the client does not read")
            if self.connection.is_finished:
                raise HandshakeError("the request is too long")
            data = self._receive(RECEIVE_SIZE, deadline_s)

    def _take_connect_line(self, deadline_s: float) -> bytes:
        """Answers a first line `CONNECT <port>` of a hybrid-vsock client, and returns what else was read."""
        if not self.who.startswith("unix"):
            return b""
        data = self._receive(CONNECT_LINE_MAX, deadline_s)
        while b"CONNECT "[: len(data)] == data[:8] and b"\n" not in data:
            if len(data) >= CONNECT_LINE_MAX:
                raise HandshakeError("a CONNECT line without an end")
            data += self._receive(CONNECT_LINE_MAX - len(data), deadline_s)
        if not data.startswith(b"CONNECT "):
            return data
        line, _, rest = data.partition(b"\n")
        port = line[8:].strip()
        if not port.isdigit():
            raise HandshakeError("a CONNECT line without a port")
        try:
            os.write(self.fd, b"OK %d\n" % int(port))
        except OSError as error:
            raise HandshakeError(f"the client is gone: {error.strerror}") from error
        return rest

    def _receive(self, size: int, deadline_s: float) -> bytes:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self.wakeup.fd, select.POLLIN)
        ready = poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
        if not ready:
            raise HandshakeError(f"no request within {self.options.handshake_timeout} s")
        if any(fd == self.wakeup.fd for fd, _ in ready) and SIGTERM in self.wakeup.take():
            raise HandshakeError("vshd is shutting down")
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise HandshakeError(f"the client is gone: {error.strerror}") from error
        if not data:
            raise HandshakeError("the client left without a request")
        return data

    # Answers.

    def _enter_directory(self, request: SetupConnectionRequest, account: Account) -> str:
        """Where the target starts. In legacy mode a bad directory is only a notice, as upstream starts there anyway."""
        try:
            enter_directory(request, account)
        except RefusalError as refusal:
            if self.connection.is_extended:
                raise
            return refusal.description
        return ""

    def _refuse(self, request: SetupConnectionRequest, refusal: RefusalError) -> None:
        """In legacy mode a program that cannot run is a session that says so and exits as a shell would."""
        kind = refusal.failure.kind
        if self.connection.is_extended or kind not in (
            messages.NOT_FOUND,
            messages.NOT_EXECUTABLE,
            messages.TOO_LONG,
        ):
            self.connection.refuse(refusal.description, refusal.failure)
        else:
            self.connection.accept(os.getpid())
            self._say(request, refusal.description)
            self.connection.send_exit(EXIT_NOT_FOUND if kind == messages.NOT_FOUND else EXIT_NOT_EXECUTABLE)
        _flush(self.fd, self.connection, LAST_WORDS_S)

    def _say(self, request: SetupConnectionRequest, text: str) -> None:
        """A line of ours among the target's output."""
        line = os.fsencode(f"vshd: {text}\n")
        if request.nopty:
            self.connection.send_data(messages.STDERR, line)
        else:
            self.connection.send_data(messages.STDOUT, line.replace(b"\n", b"\r\n"))


def make_limits(options: Options) -> Extended | None:
    """What we announce; None: legacy mode only."""
    if not options.extended:
        return None
    limits = default_limits()
    limits.silence_ms = min(options.keepalive * 1000, SILENCE_MS_MAX)
    return limits


def _make_proof(token: bytes | None) -> "Proof | None":
    if token is None:
        return None
    # Only where there is a token.
    from vshd.wire.proof import NONCE_BYTES, SERVER, Proof  # noqa: PLC0415

    return Proof(SERVER, token, os.urandom(NONCE_BYTES))


def _describe(request: SetupConnectionRequest) -> str:
    return os.fsdecode(b" ".join(request.argv)[: 2 * audit.COMMAND_SHOWN_MAX]) if request.argv else "login shell"


def _flush(fd: int, connection: ServerConnection, timeout_s: float) -> bool:
    """Sends all that waits; False when the client takes nothing for timeout_s seconds, or is gone."""
    output = connection.output
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while output.size:
        try:
            write_output(output, fd)
        except BlockingIOError:
            if not poll.poll(timeout_s * 1000):
                return False
        except OSError:
            return False
    return True
