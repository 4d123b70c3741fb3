"""Sessions that outlive their clients (docs/reference/protocol.md 7): starts, lists, signals, forgets and attaches.

Runs as vshd's own user, who alone reaches the keepers. What a client may reach is decided by its user, in the keeper.
"""

import os

from vshd.lasting.place import SessionsPlace, open_place, record_of
from vshd.session.account import Account
from vshd.session.refusal import RefusalError
from vshd.wire import kept, messages
from vshd.wire.kept import KeeperCall
from vshd.wire.requests import Attach, Lasting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.services.table import Serving

VERBS = {messages.START: "start", messages.LIST: "list", messages.SIGNAL_IT: "signal", messages.FORGET: "forget"}
MODES = ("", "attach to", "read", "follow", "write to", "wait for")


def user_of(value: "Lasting | Attach") -> bytes:
    """The user that the client asks for."""
    return value.user


def describe(value: "Lasting | Attach") -> str:
    """What the log calls it."""
    session = os.fsdecode(value.session[: kept.NAME_MAX])
    if isinstance(value, Attach):
        return f"{MODES[value.mode] if 0 < value.mode < len(MODES) else 'attach to'} session {session}"
    verb = VERBS.get(value.verb, "unknown verb for")
    return f"{verb} sessions" if value.verb == messages.LIST else f"{verb} session {session}".rstrip()


def serve(value: "Lasting | Attach", serving: "Serving", account: Account) -> str:
    """Answers the client; the end in words, for the log. Raises RefusalError."""
    if isinstance(value, Lasting) and value.verb == messages.START:
        # It needs more of vshd than the rest.
        from vshd.lasting.starting import start  # noqa: PLC0415

        record = start(value, serving.fd, account, serving.options, serving.log, serving.wakeup)
        serving.hand_over(record.id)
        serving.around.preload()
        return f"session {os.fsdecode(record.id)}"
    place = open_place(serving.options)
    try:
        if isinstance(value, Attach):
            return _attach(value, serving, account, place)
        if value.verb == messages.LIST:
            return _list(serving, account, place)
        return _order(value, serving, account, place)
    finally:
        place.close()


def _attach(attach: Attach, serving: "Serving", account: Account, place: SessionsPlace) -> str:
    reason = kept.check_attach(attach)
    if reason:
        raise RefusalError(reason, messages.BAD_REQUEST)
    uid, found = place.find(attach.session, account.uid)
    call = KeeperCall(kept.ATTACH, account.uid + 1)
    call.attach = attach
    call.who = os.fsencode(serving.who)[:100]
    call.peer, call.is_deferred, call.early = serving.connection.hand_on()
    place.ask(uid, found, call, serving.fd)
    return f"session {os.fsdecode(found)}"


def _list(serving: "Serving", account: Account, place: SessionsPlace) -> str:
    sessions = place.list_sessions(account.uid)
    answers = place.ask_all(sessions, KeeperCall(kept.LOOK, account.uid + 1))
    frames = [
        kept.encode_record(record_of(answer, *session))
        for session, answer in zip(sessions, answers, strict=True)
        if answer is not None
    ]
    serving.hand_over(b"")
    serving.send(b"".join(frames))
    return f"{len(frames)} sessions"


def _order(lasting: Lasting, serving: "Serving", account: Account, place: SessionsPlace) -> str:
    if lasting.verb not in (messages.SIGNAL_IT, messages.FORGET):
        raise RefusalError(f"vshd knows no verb {lasting.verb}", messages.BAD_REQUEST)
    if lasting.verb == messages.SIGNAL_IT and not 0 < lasting.signal <= messages.SIGNAL_MAX:
        raise RefusalError(f"there is no signal {lasting.signal}", messages.BAD_REQUEST)
    uid, found = place.find(lasting.session, account.uid)
    call = KeeperCall(kept.SIGNAL if lasting.verb == messages.SIGNAL_IT else kept.FORGET, account.uid + 1)
    call.signal = lasting.signal
    place.ask(uid, found, call)
    if lasting.verb == messages.FORGET:
        place.remove(uid, found)
    serving.hand_over(found)
    return f"session {os.fsdecode(found)}"
