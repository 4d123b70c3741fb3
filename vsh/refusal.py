"""Errors for a session that did not start: they name the cause and the remedy.

Knows the server's answer and the request to it, and nothing of connections. Loaded only after a failure.
"""

import errno
import os

from vsh.address import Address
from vsh.errors import ExecError, HungUp, VshError
from vshd.wire import messages
from vshd.wire.events import Broken, Distrusted, Failed, Refused
from vshd.wire.frames import LEGACY_MAX_PAYLOAD
from vshd.wire.messages import SetupConnectionRequest

# The statuses of a shell.
EXIT_STATUS = {messages.NOT_FOUND: 127, messages.NOT_EXECUTABLE: 126, messages.TOO_LONG: 126}


def explain(
    event: Refused | Failed | Distrusted | Broken, address: Address, request: SetupConnectionRequest
) -> VshError:
    """Returns the error for an event that ended the handshake."""
    match event:
        case Refused():
            return _refused(event, address, request)
        case Failed():
            return _refused(Refused(event.description, event.failure), address, request)
        case Distrusted():
            return VshError(
                f"{address.name} did not prove that it is the machine that vmkit started: {event.reason}",
                details=f"its answer: {event.said}" if event.said else "",
                hint="vsh sent nothing to it; vmkit list prints the running machines",
            )
        case Broken():
            return HungUp(
                f"the vshd of {address.name} closed the connection without an answer",
                details=event.reason,
                hint=_find_unfit(request) or "its log has the reason, such as a CID that it does not serve",
            )


def lacks(service: str, address: Address) -> VshError:
    return VshError(
        f"the vshd of {address.name} knows no {service}: it is older than this vsh, or ChromeOS's",
        hint="the guest's vsock ports need no vshd: -L PORT:PORT" if service == "forwards" else "",
    )


def too_long(size: int, why: str) -> VshError:
    return VshError(
        f"Serialized message too large: {size}",
        details=f"command line and environment take {size} bytes; {LEGACY_MAX_PAYLOAD} is the limit {why}",
        hint="send long arguments through stdin, or a file",
    )


def cannot_prove(address: Address, hint: str) -> VshError:
    return VshError(f"{address.name} demands its token, which ChromeOS's protocol cannot prove", hint=hint)


def _find_unfit(request: SetupConnectionRequest) -> str:
    """Finds the part of a request that ChromeOS's vshd cannot take: its strings are protobuf's, which are UTF-8."""
    named = {
        "the user": request.user,
        "the directory": request.cwd,
        **{f"argument {index}" if index else "the command": word for index, word in enumerate(request.argv)},
        **{f"the variable {os.fsdecode(name)}": name + b"=" + value for name, value in request.env.items()},
    }
    for what, word in named.items():
        try:
            word.decode()
        except UnicodeDecodeError:
            return f"ChromeOS's vshd takes UTF-8 alone, and {what} is not: {word!r}"
    return ""


def _refused(event: Refused, address: Address, request: SetupConnectionRequest) -> VshError:
    """Returns the server's answer as an error."""
    description = event.description
    if event.failure is not None and event.failure.kind == messages.BAD_USER:
        # Upstream's server goes on with advice for ChromeOS.
        description = description.partition(", if attempting")[0]
    text = f"Server was unable to set up connection: {description}"
    if event.failure is None:
        return VshError(text)
    kind = event.failure.kind
    if kind == messages.NOT_TRUSTED:
        return _token_refused(event, address)
    if kind in EXIT_STATUS or kind == messages.UNREACHABLE:
        error = ExecError(event.description, kind=kind, error=event.failure.error, status=EXIT_STATUS.get(kind, 1))
        error.hint = _find_remedy(kind, event.failure.error, request)
        return error
    if kind in (messages.NO_SESSION, messages.BUSY, messages.UNSUPPORTED):
        text = event.description
    return ExecError(text, kind=kind, error=event.failure.error)


def _find_remedy(kind: int, error: int, request: SetupConnectionRequest) -> str:
    """What to do about a program that does not run, where its name does not tell."""
    if kind == messages.NOT_FOUND and not request.argv:
        return "the guest lacks the login shell of this user; name a program that it has: vsh -- /PROGRAM"
    if kind == messages.NOT_EXECUTABLE and error == errno.ENOEXEC:
        return "the program is for another processor than the guest's, or damaged"
    return ""


def _token_refused(event: Refused, address: Address) -> VshError:
    if address.token_file:
        brief = f"{address.name} refused its token: it may not be the machine that vmkit started"
        hint = f"the token is that of {address.token_file}"
    else:
        brief = f"{address.name} demands its token"
        hint = "only the user who started the machine has it; for a machine that is not in your registry: --token_file"
    return VshError(brief, details=f"its answer: {event.description}", hint=hint)
