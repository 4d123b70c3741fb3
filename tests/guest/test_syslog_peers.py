"""The log of a guest with a distribution's own programs: util-linux's logger, and rsyslog, which sends lines on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmkit
from tests.guest.conftest import DEADLINE_S, Run
from tests.guest.test_syslog import read_syslog
from tests.vsh.live import wait_until

# Building its image takes most of a minute.
pytestmark = pytest.mark.slow

RSYSLOG = """
module(load="imuxsock" SysSock.Use="off")
module(load="omuxsock")
input(type="imuxsock" Socket="/run/in.sock")
$OMUxSockSocket /dev/log
*.* :omuxsock:;RSYSLOG_ForwardFormat
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[vmkit.Machine]:
    recipe = tmp_path_factory.mktemp("peers") / "peers.toml"
    recipe.write_text('extends = "debian"\npackages = ["rsyslog"]\n')
    with vmkit.Machine(str(recipe), accelerator="tcg", backend="user", name="peers") as started:
        yield started


def test_logger_of_util_linux_is_understood_in_its_three_forms(machine: vmkit.Machine, vmkit: Run) -> None:
    script = (
        "logger -i -t app -p daemon.err 'of root: x'; logger --rfc3164 -t app -p user.info 'of 3164';"
        " logger --rfc5424 --id=4000000 -t app -p local1.debug 'of 5424'; printf 'one\\ntwo\\n' | logger -t lines"
    )
    assert machine.run(["sh", "-c", script], timeout=DEADLINE_S).exit == 0
    found = {record["text"]: record for record in read_syslog(vmkit, "peers")}
    keys = ("ident", "facility", "priority", "uid")
    assert [found["of root: x"][key] for key in keys] == ["app", "daemon", "err", 0]
    # It says its own process id.
    assert "claimed_pid" not in found["of root: x"]
    assert [found["of 3164"][key] for key in keys] == ["app", "user", "info", 0]
    assert [found["of 5424"][key] for key in keys] == ["app", "17", "debug", 0]
    assert found["of 5424"]["claimed_pid"] == 4000000
    assert found["one"]["ident"] == found["two"]["ident"] == "lines"


def test_line_that_rsyslog_sends_on_keeps_its_name_and_its_host(machine: vmkit.Machine, vmkit: Run) -> None:
    script = f"cat > /run/rsyslog.conf <<'END'\n{RSYSLOG}\nEND\nrsyslogd -f /run/rsyslog.conf"
    done = machine.run(["sh", "-c", script], text=True, timeout=DEADLINE_S)
    assert done.exit == 0, done
    send = "until logger -u /run/in.sock -t app -p mail.warning 'through rsyslog'; do sleep 0.1; done"
    assert machine.run(["sh", "-c", send], timeout=DEADLINE_S).exit == 0

    def find() -> list[dict[str, Any]]:
        return [record for record in read_syslog(vmkit, "peers") if record["text"] == "through rsyslog"]

    wait_until(lambda: bool(find()), "rsyslog has sent the line on")
    keys = ("ident", "facility", "priority", "uid", "host")
    assert [find()[0][key] for key in keys] == ["app", "mail", "warn", 0, "peers"]
