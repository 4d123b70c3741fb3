"""The log of a real guest on the host: what its programs, its users and its kernel write, and a flood of lines."""

import json
import subprocess
from typing import Any

from tests.docs.schemas import check_form
from tests.guest.conftest import BIN, DEADLINE_S, Run

LINES = 10_000
FLOOD = f"""
import socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect("/dev/log")
start = time.monotonic()
for number in range({LINES}):
    s.send(b"<14>flood: line %d of a usual length, with some words of a program that says what it does" % number)
print({LINES} / (time.monotonic() - start))
"""


def read_syslog(vmkit: Run, name: str, *words: str) -> list[dict[str, Any]]:
    done = vmkit("logs", name, "--kind", "syslog", "--json", *words)
    assert (done.returncode, done.stderr) == (0, b"")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_log_of_a_guest_reaches_the_host(ready: str, vmkit: Run, vsh: Run) -> None:
    guest = ("--vm_name", ready)
    assert vsh(*guest, "--", "logger", "-t", "app", "-p", "daemon.err", "from root").returncode == 0
    assert vsh(*guest, "--user=user", "--", "logger", "-t", "kernel", "from a user").returncode == 0
    assert vsh(*guest, "--", "sh", "-c", "echo '<4>driver: broken' >/dev/kmsg").returncode == 0
    records = read_syslog(vmkit, ready)
    for record in records:
        check_form("syslog", record)
    found = {record["text"]: record for record in records}
    keys = ("source", "facility", "priority", "ident", "uid")
    assert [found["from root"][key] for key in keys] == ["syslog", "daemon", "err", "app", 0]
    assert [found["from a user"][key] for key in keys] == ["syslog", "user", "notice", "kernel", 1000]
    assert [found["broken"][key] for key in keys] == ["kernel", "user", "warn", "driver", None]
    # The kernel's log is there from its first line on.
    assert any(record["ident"] == "kernel" and "Linux version" in record["text"] for record in records)
    assert all(record["cid"] == found["broken"]["cid"] and record["machine"] == ready for record in records)
    (shown,) = vmkit("logs", ready, "--kind", "syslog", "--grep", "^kernel: from a user").stdout.decode().splitlines()
    assert shown.endswith(f"kernel[{found['from a user']['pid']}] uid=1000: from a user")
    follower = subprocess.Popen(
        [str(BIN / "vmkit"), "logs", ready, "--kind", "syslog", "-f", "--grep", "root: followed$"],
        stdout=subprocess.PIPE,
    )
    try:
        assert vsh(*guest, "--", "logger", "followed").returncode == 0
        assert follower.stdout is not None
        assert follower.stdout.readline().endswith(b": followed\n")
    finally:
        follower.kill()
        follower.communicate(timeout=DEADLINE_S)


def test_flood_of_lines_is_whole_or_says_what_is_missing(ready: str, vmkit: Run, vsh: Run) -> None:
    done = vsh("--vm_name", ready, "--", "python3", "-c", FLOOD)
    assert done.returncode == 0, done.stderr
    records = read_syslog(vmkit, ready)
    lines = [record for record in records if record["ident"] == "flood"]
    dropped = sum(record.get("dropped", 0) for record in records)
    assert LINES - dropped <= len(lines) <= LINES
    numbers = [int(record["text"].split()[1]) for record in lines]
    assert numbers == sorted(numbers)
    assert numbers[-1] == LINES - 1
