"""Records of a guest's log on their way to this host's journal and syslog: sockets of the tests stand for both."""

import socket
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S
from vmkit.errors import HostError
from vmkit.machine import sinks
from vmkit.machine.sinks import open_sink, render_fields, render_line

RECORD: dict[str, object] = {
    "t": 1.5,
    "machine": "web",
    "cid": 3,
    "time": 1.25,
    "number": 7,
    "source": "syslog",
    "facility": "daemon",
    "priority": "err",
    "ident": "app",
    "pid": 12,
    "uid": 1000,
    "gid": 5,
    "text": "a\n\x1bb",
}


def test_line_of_syslog_names_the_machine_and_has_escapes() -> None:
    assert render_line(RECORD) == b"<27>vmkit-web: app[12] uid=1000: a\\n\\x1bb"
    kernel = {**RECORD, "facility": "kern", "priority": "warn", "ident": "kernel", "pid": None, "uid": None}
    assert render_line({**kernel, "text": "x"}) == b"<12>vmkit-web: kernel: x"


def test_fields_of_the_journal_are_those_of_the_record() -> None:
    fields = render_fields(RECORD)
    assert fields.startswith(
        b"PRIORITY=3\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=vmkit-web\nMESSAGE\n"
        + bytes([4, 0, 0, 0, 0, 0, 0, 0])
        + b"a\n\x1bb\n"
    )
    for line in (b"GUEST_IDENT=app", b"GUEST_MACHINE=web", b"GUEST_CID=3", b"GUEST_PID=12", b"GUEST_UID=1000"):
        assert line in fields.split(b"\n")


def test_value_cannot_begin_another_field() -> None:
    fields = render_fields({**RECORD, "text": "x", "ident": "a\nPRIORITY=0"})
    assert fields.count(b"\nPRIORITY=0") == 1
    assert b"GUEST_IDENT\n" + (12).to_bytes(8, "little") + b"a\nPRIORITY=0\n" in fields


def test_guest_has_no_name_of_a_program_of_this_host_and_no_emergency_of_it() -> None:
    """Daemons print an emergency on all terminals."""
    record = {**RECORD, "ident": "sshd", "priority": "emerg", "text": "x"}
    fields = render_fields(record).split(b"\n")
    assert b"SYSLOG_IDENTIFIER=vmkit-web" in fields
    assert b"PRIORITY=1" in fields
    assert render_line(record).startswith(b"<25>vmkit-web: sshd")


@pytest.mark.parametrize(("kind", "constant"), [("journal", "JOURNAL_SOCKET"), ("syslog", "SYSLOG_SOCKET")])
def test_records_go_to_the_hosts_socket(
    kind: str, constant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(sinks, constant, str(path))
    with pytest.raises(HostError, match=f"cannot send to {path}: No such file or directory"):
        open_sink(kind)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(path))
        daemon.settimeout(DEADLINE_S)
        sink = open_sink(kind)
        sink.send(RECORD)
        assert b"app" in daemon.recv(65536)
    with pytest.raises(HostError, match="cannot send to"):
        sink.send(RECORD)
    sink.close()
