"""What a client asks of a vshd about lasting sessions (docs/reference/protocol.md 7): one connection for each call.

Blocking, with deadlines. Knows nothing of options and terminals.
"""

import os
import select
import time

from vsh.address import Address
from vsh.defaults import fill_request, find_user
from vsh.errors import ConnectionLost, ExecError, Unanswered, VshError
from vsh.session import Session, describe_impossible_exit, make_limits, open_service, open_session
from vsh.transport import wait_until
from vshd.wire import messages
from vshd.wire.client import STUB_USER, make_service_request
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.events import Positioned
from vshd.wire.kept import ListReader, SessionRecord
from vshd.wire.messages import Extended, SetupConnectionRequest
from vshd.wire.requests import Attach, Lasting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SERVICE = "sessions that last"
READ_SIZE = 1 << 16

_HINTS = {
    messages.START: "vsh --sessions lists the sessions; --forget makes the name of an ended one free",
    messages.FORGET: "end it first: vsh --signal {} TERM",
}


def start(address: Address, request: SetupConnectionRequest, lasting: Lasting, *, timeout_s: float) -> str:
    """Starts a session with the command of `request`, and returns its id. Raises VshError."""
    fill_request(request, address.entry)
    lasting.verb = messages.START
    lasting.user, request.user = request.user, b""
    lasting.command = request.encode()
    return _order(address, lasting, timeout_s)


def send_signal(address: Address, session: str, number: int, *, user: str, timeout_s: float) -> None:
    """Sends a signal to the processes of a session. Raises VshError."""
    _order(address, _name(messages.SIGNAL_IT, session, user, number), timeout_s)


def forget(address: Address, session: str, *, user: str, timeout_s: float) -> None:
    """Forgets an ended session, with its output. Raises VshError."""
    _order(address, _name(messages.FORGET, session, user), timeout_s)


def read_sessions(address: Address, *, user: str, timeout_s: float) -> list[SessionRecord]:
    """The sessions that the user may reach, the oldest first. Raises VshError."""
    deadline_s = time.monotonic() + timeout_s
    whose = os.fsencode(user) or find_user(address.entry)
    request = make_service_request(lasting=Lasting(verb=messages.LIST, user=whose))
    fd, rest, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    try:
        return sorted(_read_records(fd, rest, address, deadline_s), key=lambda record: (record.started_s, record.id))
    except RemoteProtocolError as error:
        raise VshError(f"{address.name} sent a list that vsh cannot read: {error}") from error
    except OSError as error:
        raise ConnectionLost(f"lost the connection to {address.name}: {error.strerror}") from error
    finally:
        os.close(fd)


def open_attached(
    address: Address,
    attach: Attach,
    *,
    timeout_s: float,
    limits: Extended | None = None,
    see: "Callable[[str, memoryview], None] | None" = None,
) -> tuple[Session, Positioned]:
    """A connection to a lasting session, and where its output begins. Raises VshError."""
    attach.user = attach.user or find_user(address.entry)
    request = make_service_request(attach=attach)
    deadline_s = time.monotonic() + (timeout_s or 1e9)
    try:
        session = open_session(address, request, limits=limits or make_limits(), timeout_s=timeout_s, see=see)
    except VshError as error:
        if os.fsdecode(STUB_USER) in error.brief:
            from vsh import refusal  # noqa: PLC0415 - only after a failure

            raise refusal.lacks(SERVICE, address) from error
        _explain(error, os.fsdecode(attach.session))
        raise
    try:
        return session, _await_position(session, deadline_s)
    except BaseException:
        session.close()
        raise


def _await_position(session: Session, deadline_s: float) -> Positioned:
    poll = select.poll()
    poll.register(session.fd, select.POLLIN)
    while True:
        events = session.receive()
        for event in events:
            session.check(event)
            if isinstance(event, Positioned):
                session.put_back(events)
                return event
            raise VshError(f"{session.name} did not say where the output begins")
        if not wait_until(poll.poll, deadline_s):
            raise Unanswered(f"the vshd of {session.name} does not answer", hint="the guest may be paused or stuck")


def _order(address: Address, lasting: Lasting, timeout_s: float) -> str:
    lasting.user = lasting.user or find_user(address.entry)
    request = make_service_request(lasting=lasting)
    try:
        fd, _, description = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    except ExecError as error:
        if error.kind == messages.BUSY:
            error.hint = _HINTS.get(lasting.verb, "").format(os.fsdecode(lasting.session))
        _explain(error, os.fsdecode(lasting.session))
        raise
    os.close(fd)
    return description


def _explain(error: VshError, session: str) -> None:
    if isinstance(error, ExecError) and not error.hint:
        if error.kind == messages.NO_SESSION:
            error.hint = "vsh --sessions lists the sessions of this user"
        elif error.kind == messages.BUSY:
            error.hint = f"--steal takes it over; vsh --output {session} --follow only reads"


def _name(verb: int, session: str, user: str, number: int = 0) -> Lasting:
    return Lasting(verb=verb, session=os.fsencode(session), user=os.fsencode(user), signal=number)


def _read_records(fd: int, data: bytes, address: Address, deadline_s: float) -> list[SessionRecord]:
    """Raises RemoteProtocolError, VshError, OSError."""
    reader = ListReader()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    records = reader.receive(data)
    while True:
        if not wait_until(poll.poll, deadline_s):
            raise Unanswered(f"the vshd of {address.name} does not answer", hint="the guest may be paused or stuck")
        data = os.read(fd, READ_SIZE)
        if not data:
            break
        records += reader.receive(data)
    if not reader.is_between_records:
        raise ConnectionLost(f"lost the connection to {address.name}: the list has no end")
    for record in records:
        impossible = describe_impossible_exit(record.code, record.signal)
        if impossible:
            raise RemoteProtocolError(f"a session in it has the exit {impossible}, which no process can have")
    return records
