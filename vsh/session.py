"""One session on the host's side: the connection to a vshd after the handshake, and the two moves of a poll loop.

Owns the descriptor. Knows nothing of where bytes come from or go to: vsh.pump connects a session to descriptors or
memory.
"""

import os
import select
import time

from vsh.address import Address
from vsh.errors import ConnectionLost, Unanswered, Unreachable, VshError
from vsh.signals import SIGTERM
from vsh.transport import open_transport, wait_until
from vshd.carry.conduit import Conduit, write_output
from vshd.wire import messages
from vshd.wire.buffers import Buffers
from vshd.wire.client import STUB_USER, ClientConnection, make_service_request
from vshd.wire.connection import SILENCE_MS_MAX, default_limits
from vshd.wire.errors import LocalProtocolError
from vshd.wire.events import Broken, Distrusted, Established, Event, Exited, Failed, HandedOver, Refused
from vshd.wire.frames import LEGACY_MAX_PAYLOAD
from vshd.wire.messages import Extended, SetupConnectionRequest
from vshd.wire.requests import Forward
from vshd.wire.silence import Silence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vsh.reaction import Reaction
    from vsh.registry import Entry
    from vshd.wire.proof import Proof

FOREVER_S = 1e9
# waitpid(2)
STATUS_MAX = 255


def describe_impossible_exit(code: int, signal: int) -> str:
    """Returns what is wrong with an exit that a peer reports, such as `status 256`; empty for one that can be."""
    if 0 <= code <= STATUS_MAX and 0 <= signal <= messages.SIGNAL_MAX:
        return ""
    return f"signal {signal}" if signal else f"status {code}"


class Session:
    """Invariant: `fd` is open, and the connection past its handshake, until close()."""

    # Is shown each session: vsh.forks, in programs that may make children.
    on_open: "Callable[[Session], None] | None" = None

    def __init__(
        self, fd: int, connection: ClientConnection, name: str, see: "Callable[[str, memoryview], None] | None" = None
    ) -> None:
        """see: gets all bytes that travel, with their direction."""
        self.fd = fd
        self.connection = connection
        self.name = name
        self.pid = 0
        # The transport takes no more.
        self.is_mute = False
        # Where a forward listens.
        self.description = ""
        # The machine, where the registry has it; and whether the session was lost without anybody's wish here.
        self.entry: Entry | None = None
        self.is_lost = False
        self._see = see
        self.buffers = Buffers()
        self._received = 0
        self._early: list[Event] = []
        self._silence: Silence | None = None
        # Made by the first signal.
        self._reaction: Reaction | None = None
        if self.on_open is not None:
            self.on_open(self)

    def start(self, pid: int, early: list[Event]) -> None:
        """Notes that the target runs. `early`: the events that came with that message."""
        self.pid = pid
        self._early = early
        connection = self.connection
        if connection.peer is not None and connection.limits is not None:
            self._silence = Silence(
                own_ms=connection.limits.silence_ms, peer_ms=connection.peer.silence_ms, now_s=time.monotonic()
            )

    @property
    def can_pass(self) -> bool:
        """Whether bulk may go through conduits. It may not when each frame is shown (--debug)."""
        return self.connection.is_extended and self._see is None

    def take_bulk(self, stream: int, conduit: Conduit) -> int:
        """Moves the next bytes of a large frame of `stream` into a conduit; returns how many. 0: call receive()."""
        room = 0 if self._early else self.connection.bulk_room(stream)
        if not room:
            return 0
        try:
            taken = conduit.fill(self.fd, room)
        except OSError:
            # No bytes have come; or there is no room, since the sink takes none; or the transport is broken.
            return 0
        if taken:
            self._hear()
            self.connection.took(stream, taken)
        return taken

    def receive(self, *, is_passing: bool = False) -> list[Event]:
        """Returns the events that have come. Their data is valid until the next call.

        is_passing: of a large frame that is likely next, reads only the head; take_bulk() moves the rest.
        """
        if self._early:
            events, self._early = self._early, []
            return events
        self.buffers.received(self._received)
        self._received = 0
        buffer = self.buffers.current
        head_size = self.connection.bulk_head_size if is_passing else 0
        if head_size:
            buffer = buffer[:head_size]
        try:
            size = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return []
        except OSError:
            size = 0
        if size:
            self._hear()
        self._received = size
        if self._see is not None:
            self._see("<", self.buffers.current[:size])
        return self.connection.receive_data(self.buffers.current[:size]) if size else self.connection.receive_end()

    def put_back(self, events: list[Event]) -> None:
        """Has receive() return these again, before anything else."""
        self._early = events

    @property
    def has_early(self) -> bool:
        """Whether events wait that no poll() will announce."""
        return bool(self._early)

    def check(self, event: Event) -> None:
        """Raises ConnectionLost if this event ends the session before its target."""
        if isinstance(event, Broken):
            raise self._lose(f"lost the connection to {self.name}: {event.reason}")
        if isinstance(event, Failed):
            raise self._lose(f"{self.name} ended the session: {event.description}")
        # The protocol's number is wider than any status: its low byte alone could pass for success.
        if isinstance(event, Exited):
            impossible = describe_impossible_exit(event.code, event.signal)
            if impossible:
                raise ConnectionLost(f"{self.name} reported the exit {impossible}, which no process can have")

    def explain(self, error: ConnectionLost) -> None:
        """Adds the machine's end to the error as its cause, if that ended the session. Waits a moment for the end.

        Call it when the terminal is restored, before raising the error again.
        """
        if self.is_lost:
            from vsh.ending import explain_loss  # noqa: PLC0415 - only after a failure

            explain_loss(error, self.entry)

    def _lose(self, brief: str, *, hint: str = "") -> ConnectionLost:
        self.is_lost = True
        return ConnectionLost(brief, hint=hint)

    def flush(self) -> None:
        """Sends the waiting bytes, as far as the transport takes them. receive() reports a broken transport, and may
        still return the session's end. The caller should read no more input for the session then."""
        output = self.connection.output
        size_before = output.size
        if not size_before:
            return
        if self._silence is not None:
            self._silence.said(time.monotonic())
        try:
            while output.size:
                if self._see is None:
                    write_output(output, self.fd)
                else:
                    size = os.writev(self.fd, output.buffers())
                    self._see(">", memoryview(b"".join(output.buffers())[:size]))
                    output.sent(size)
        except BlockingIOError:
            return
        except OSError:
            output.clear()
            self.is_mute = True
        finally:
            if self._reaction is not None and output.size < size_before:
                self._reaction.moved(time.monotonic())

    def send_signal(self, number: int) -> None:
        """Sends a signal to the target, if the peer's protocol has it, and watches whether the peer reacts."""
        if self.connection.send_signal(number):
            from vsh.reaction import Reaction  # noqa: PLC0415 - most sessions send no signal

            self._reaction = self._reaction or Reaction()
            is_plea = number == SIGTERM and not self.connection.is_extended
            self._reaction.signalled(time.monotonic(), is_plea=is_plea)

    def check_peer(self) -> float | None:
        """Sends "alive" when it is time; returns how many seconds the next call can wait.

        Raises ConnectionLost when the peer has fallen silent, or does not react to signals.
        """
        waits = [wait_s for wait_s in (self._check_reaction(), self._check_silence()) if wait_s is not None]
        return min(waits, default=None)

    def _check_reaction(self) -> float | None:
        reaction = self._reaction
        if reaction is None:
            return None
        now_s, is_sent = time.monotonic(), not self.connection.output.size
        fault = reaction.find_fault(now_s, is_sent=is_sent)
        if fault:
            raise self._lose(
                f"lost the connection to {self.name}: {fault}", hint="the command may still run in the guest"
            )
        return reaction.wait_s(now_s, is_sent=is_sent)

    def _check_silence(self) -> float | None:
        silence = self._silence
        if silence is None:
            return None
        now_s = time.monotonic()
        if silence.is_peer_lost(now_s):
            raise self._lose(f"lost the connection to {self.name}: it has fallen silent")
        if silence.is_word_due(now_s):
            self.connection.send_alive()
            self.flush()
        return silence.wait_s(time.monotonic())

    def _hear(self) -> None:
        if self._silence is not None:
            self._silence.heard(time.monotonic())
        if self._reaction is not None:
            self._reaction.heard()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. The server ends a target that still runs."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def let_go(self) -> None:
        """Closes a forked child's copy of the descriptor. The parent goes on with its own."""
        self.close()


def make_limits(silence_ms: int | None = None) -> Extended:
    """Returns the limits that we announce. silence_ms None: the default."""
    limits = default_limits()
    if silence_ms is not None:
        limits.silence_ms = min(silence_ms, SILENCE_MS_MAX)
    return limits


def open_session(
    address: Address,
    request: SetupConnectionRequest,
    *,
    limits: Extended | None,
    timeout_s: float,
    see: "Callable[[str, memoryview], None] | None" = None,
) -> Session:
    """Connects, sends `request` and waits until the target runs. limits None: legacy mode. timeout_s 0: no limit.

    see: gets all bytes that travel, with their direction, ">" or "<".

    Raises ExecError when the command could not be run, VshError otherwise. When the machine has ended, the error names
    that as its cause.
    """
    deadline_s = time.monotonic() + (timeout_s or FOREVER_S)
    try:
        return _open(address, request, limits, deadline_s, see)
    except Unreachable as error:
        from vsh.ending import explain_loss  # noqa: PLC0415 - only after a failure

        explain_loss(error, address.entry)
        raise
    except _TooLongForLegacy as error:
        # The offer itself may have made the request too long; without it a legacy server may take it.
        request.extended = None
        size = len(request.encode())
        if size <= LEGACY_MAX_PAYLOAD:
            return _open(address, request, None, deadline_s, see)
        from vsh import refusal  # noqa: PLC0415 - only after a failure

        raise refusal.too_long(size, f"the vshd of {address.name} does not speak the extended protocol") from error
    except LocalProtocolError as error:
        request.extended = None
        from vsh import refusal  # noqa: PLC0415 - only after a failure

        raise refusal.too_long(len(request.encode()), "without the extended protocol") from error


def open_raw(address: Address, forward: Forward, *, timeout_s: float) -> tuple[int, bytes, str]:
    """Opens the connection of a forward (docs/reference/protocol.md 3). Returns its non-blocking descriptor, the bytes
    that were read from it already, and the server's text: where it listens, or empty. Raises VshError.
    """
    return open_service(address, make_service_request(forward=forward), timeout_s=timeout_s, name="forwards")


def open_service(
    address: Address, request: SetupConnectionRequest, *, timeout_s: float, name: str
) -> tuple[int, bytes, str]:
    """open_raw() for any service. name: what a server that does not know the service knows none of."""
    from vsh import refusal  # noqa: PLC0415 - programs that forward have time

    deadline_s = time.monotonic() + (timeout_s or FOREVER_S)
    try:
        session = _open(address, request, make_limits(), deadline_s, None)
    except VshError as error:
        # No account has the stub's user name. The server looked for it, and so does not know the service.
        if os.fsdecode(STUB_USER) in error.brief:
            raise refusal.lacks(name, address) from error
        raise
    except _TooLongForLegacy as error:
        raise refusal.lacks(name, address) from error
    return session.fd, session.connection.take_rest(), session.description


class _TooLongForLegacy(Exception):  # noqa: N818 - a turn of the handshake, no failure yet
    """A legacy server has refused the stub of a deferred request."""


def _open(
    address: Address,
    request: SetupConnectionRequest,
    limits: Extended | None,
    deadline_s: float,
    see: "Callable[[str, memoryview], None] | None",
) -> Session:
    def make_connection(proof: "Proof | None") -> ClientConnection:
        connection = ClientConnection(limits, proof)
        connection.send_setup(request)
        return connection

    if address.door is not None:
        if limits is None and address.door.is_token_demanded:
            from vsh import refusal  # noqa: PLC0415 - only after a failure

            raise refusal.cannot_prove(
                address, "leave --noextended out; for ChromeOS's vshd set container.legacy, see vsh(1)"
            )
        fd, connection = address.door.admit(make_connection)
    else:
        connection = make_connection(_make_proof(address, limits))
        fd = open_transport(address, deadline_s)
    try:
        session = Session(fd, connection, address.name, see)
        session.entry = address.entry
        return _shake_hands(session, address, request, deadline_s)
    except BaseException:
        os.close(fd)
        raise


def _make_proof(address: Address, limits: Extended | None) -> "Proof | None":
    """Returns our proof for a machine that has a token, else None."""
    if not address.token_file:
        return None
    if limits is None:
        from vsh import refusal  # noqa: PLC0415 - only after a failure

        raise refusal.cannot_prove(address, "leave --noextended out")
    # Most machines have none.
    from vsh.token import make_proof  # noqa: PLC0415

    return make_proof(address.token_file)


def _shake_hands(session: Session, address: Address, request: SetupConnectionRequest, deadline_s: float) -> Session:
    poll = select.poll()
    connection = session.connection
    while True:
        session.flush()
        poll.register(session.fd, select.POLLIN | (select.POLLOUT if connection.output.size else 0))
        if not wait_until(poll.poll, deadline_s):
            raise Unanswered(
                f"the vshd of {address.name} does not answer",
                hint="the guest may be paused or stuck; --connect_timeout waits longer",
            )
        events = session.receive()
        for index, event in enumerate(events):
            if isinstance(event, Established):
                session.start(event.pid, events[index + 1 :])
                return session
            if isinstance(event, HandedOver):
                session.description = event.description
                return session
            if isinstance(event, Refused) and event.is_too_long:
                raise _TooLongForLegacy
            if isinstance(event, (Refused, Failed, Distrusted, Broken)):
                from vsh import refusal  # noqa: PLC0415 - only after a failure

                raise refusal.explain(event, address, request)
