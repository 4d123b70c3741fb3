"""Sends the records of a guest's log on to this host's journal or syslog, where other programs read them.

Each says which machine it is of: no line of a guest's program looks like one of a program of this host. The ids of the
writer are the guest's, so they have names of their own there: the journal's _PID and _UID are vmkit's.
"""

import socket
from collections.abc import Callable, Mapping

from vmkit.errors import HostError
from vmkit.machine.syslog import escape
from vmkit.memory.lines import FACILITIES, LEVELS

SYSLOG_SOCKET = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"
# A journal that takes nothing for so long has a fault.
SEND_S = 30.0
_USER = 1
# Keys of a record, and the journal's fields (systemd.journal-fields(7)); the last are of ours.
_FIELDS = {
    "text": "MESSAGE",
    "ident": "GUEST_IDENT",
    "machine": "GUEST_MACHINE",
    "cid": "GUEST_CID",
    "source": "GUEST_SOURCE",
    "number": "GUEST_NUMBER",
    "time": "GUEST_TIME",
    "pid": "GUEST_PID",
    "uid": "GUEST_UID",
    "gid": "GUEST_GID",
    "dropped": "GUEST_DROPPED",
}


class SocketSink:
    """A datagram for each record, to a socket of this host."""

    def __init__(self, path: str, render: Callable[[Mapping[str, object]], bytes]) -> None:
        """Raises HostError where nothing listens."""
        self._path = path
        self._render = render
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(SEND_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise HostError(
                f"cannot send to {path}: {error.strerror}", hint="start the daemon that listens there"
            ) from error

    def send(self, record: Mapping[str, object]) -> None:
        """Raises HostError."""
        try:
            self._socket.send(self._render(record))
        except OSError as error:
            raise HostError(f"cannot send to {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Sends nothing more."""
        self._socket.close()


def open_sink(kind: str) -> SocketSink:
    """The host's `journal` or `syslog`. Raises HostError."""
    return SocketSink(*{"journal": (JOURNAL_SOCKET, render_fields), "syslog": (SYSLOG_SOCKET, render_line)}[kind])


def render_line(record: Mapping[str, object]) -> bytes:
    """The line of syslog(3): the machine's name stands for the program, and the guest's words follow."""
    pid, uid = record.get("pid"), record.get("uid")
    who = f"{record.get('ident') or '-'}" + (f"[{pid}]" if pid is not None else "") + (f" uid={uid}" if uid else "")
    text = escape(f"{who}: {record.get('text')}")
    return f"<{_number(record)}>{_name_machine(record)}: {text}".encode()


def render_fields(record: Mapping[str, object]) -> bytes:
    """The fields of the journal's own protocol. A value with a line end has its length before it."""
    facility, level = divmod(_number(record), 8)
    fields = {"PRIORITY": str(level), "SYSLOG_FACILITY": str(facility)}
    fields["SYSLOG_IDENTIFIER"] = _name_machine(record)
    for key, name in _FIELDS.items():
        if record.get(key) is not None:
            fields[name] = str(record[key])
    return b"".join(_render_field(name, value.encode(errors="replace")) for name, value in fields.items())


def _render_field(name: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return name.encode() + b"=" + value + b"\n"
    return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"


def _name_machine(record: Mapping[str, object]) -> str:
    return f"vmkit-{record.get('machine')}"


def _number(record: Mapping[str, object]) -> int:
    """Facility and level as one number. This host's kernel is not the guest's: its lines are of the facility user.

    A guest has no emergency of this host's: its daemons print those on all terminals.
    """
    facility, priority = record.get("facility"), record.get("priority")
    number = FACILITIES.index(str(facility)) if facility in FACILITIES else _USER
    level = LEVELS.index(str(priority)) if priority in LEVELS else LEVELS.index("notice")
    return (number if 0 < number < 24 else _USER) << 3 | max(level, LEVELS.index("alert"))
