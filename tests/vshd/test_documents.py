"""What is written beside the code says what the code does."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vsh.cli import TERMINAL_VARIABLES
from vsh.flags import KINDS
from vshd import server
from vshd.flags import Options
from vshd.session import session
from vshd.wire import connection, messages

CHECKOUT = Path(__file__).resolve().parents[2]
PROTOCOL = (CHECKOUT / "docs/reference/protocol.md").read_text()


@pytest.mark.parametrize("page", ["vsh.1", "vshd.8"])
def test_man_pages_have_every_flag_and_no_other(page: str) -> None:
    lines = (CHECKOUT / "docs/man" / page).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith('.\\"')).replace("\\-", "-").replace("\\fR", "")
    named = set(re.findall(r"--([a-z][a-z0-9_]+)", text))
    flags = set(KINDS) if page == "vsh.1" else set(Options.__slots__)
    switches = {f"no{name}" for name in flags}
    of_others = {"forward_to", "forward_to_host_port", "inherit_env", "default_user", "token_from", "no"}
    # Of a flag that is on by default, a page shows the way to turn it off.
    turned_off = {name.removeprefix("no") for name in named}
    assert flags - named - turned_off == set(), "a flag the page does not have"
    assert named - flags - switches - of_others == set(), "a flag of the page that is none"


@pytest.mark.skipif(shutil.which("man") is None, reason="no man to check the pages with")
@pytest.mark.parametrize("page", ["vsh.1", "vshd.8"])
def test_man_pages_render_without_warnings(page: str) -> None:
    argv = ["man", "--warnings", "-l", str(CHECKOUT / "docs/man" / page)]
    done = subprocess.run(argv, capture_output=True, check=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
    assert done.stderr == b""


@pytest.mark.parametrize("value", [connection.MAX_DATA, connection.WINDOW, *connection.MAX_DATA_RANGE])
def test_protocol_document_has_the_limits(value: int) -> None:
    assert str(value) in PROTOCOL


def test_protocol_document_has_what_our_request_adds() -> None:
    differences = PROTOCOL.partition("*Byte for byte* means")[2].partition("### 1.1")[0]
    for name in TERMINAL_VARIABLES:
        assert f"`{name.decode()}`" in differences


def test_protocol_document_has_the_kinds_of_failure() -> None:
    for number, name in enumerate(
        ("OTHER", "NOT_FOUND", "NOT_EXECUTABLE", "TOO_LONG", "BAD_DIRECTORY", "BAD_USER", "LIMIT", "BAD_REQUEST")
    ):
        assert f"| {number} `{name}` |" in PROTOCOL
        assert getattr(messages, name) == number
    assert "| 8 `SHUTDOWN` |" in PROTOCOL
    assert "| 9 `PROTOCOL` |" in PROTOCOL


def test_protocol_document_has_every_field() -> None:
    for kind in (messages.Extended, messages.GuestMessage, messages.HostMessage, messages.SetupConnectionRequest):
        for field in kind.FIELDS:
            assert f"`{field.name}`" in PROTOCOL, field.name
            assert str(field.number) in PROTOCOL


def test_limits_have_names() -> None:
    assert sum((1.0, 4.0)) < server.SHUTDOWN_S
    assert len("CONNECT 4294967295\n") <= session.CONNECT_LINE_MAX


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze to check the units with")
def test_units_are_valid(tmp_path: Path) -> None:
    for name in ("vshd.service", "vshd.socket"):
        (tmp_path / name).write_bytes((CHECKOUT / "templates/systemd" / name).read_bytes())
    argv = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "vshd.socket")]
    done = subprocess.run(argv, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unit_restarts_the_daemon_alone() -> None:
    unit = (CHECKOUT / "templates/systemd/vshd.service").read_text()
    assert "\nKillMode=process\n" in unit
    assert "--end_sessions" not in unit
