"""What a real machine's JSON looks like: docs/reference/files.md, held by its schemas."""

import json
import subprocess
import time
from pathlib import Path

from tests.docs.schemas import check_form
from tests.guest.conftest import BIN, DEADLINE_S, Run


def test_json_of_a_machine_has_the_forms_of_the_reference(up: Run, vmkit: Run, folders: Path) -> None:
    started = json.loads(up("--name", "forms", "--json").stdout)
    check_form("up", started)
    check_form("machine", json.loads(vmkit("status", "forms", "--json").stdout))
    check_form("machines", json.loads(vmkit("list", "--json").stdout))
    check_form("machine", json.loads((Path(started["directory"]) / "machine.json").read_text()))
    lines = (Path(started["directory"]) / "events.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        check_form("event", json.loads(line))
    kept = json.loads(vmkit("forward", "forms", "-L", "0:localhost:80", "--json").stdout)
    check_form("forwards", [kept])
    check_form("forwards", json.loads(vmkit("forward", "--list", "--json").stdout))
    assert vmkit("forward", "--remove", str(kept["number"])).returncode == 0
    assert vmkit("kill", "forms").returncode == 0


def test_json_of_a_build_has_the_form_of_the_reference(built: None, vmkit: Run) -> None:
    answer = json.loads(vmkit("build", "tiny", "--drift", "--json").stdout)
    check_form("build", answer)
    check_form("manifest", json.loads(Path(answer["manifest"]).read_text()))


def test_json_of_an_end_has_the_form_of_the_reference(up: Run, vmkit: Run) -> None:
    started = json.loads(up("--name", "ends", "--json").stdout)
    events = Path(started["directory"]) / "events.jsonl"
    with subprocess.Popen([str(BIN / "vmkit"), "wait", "ends", "--json"], stdout=subprocess.PIPE) as waiting:
        end_s = time.monotonic() + DEADLINE_S
        while '"request": "watch"' not in events.read_text():
            assert time.monotonic() < end_s, events.read_text()
        assert vmkit("kill", "ends").returncode == 0
        output, _ = waiting.communicate(timeout=DEADLINE_S)
    assert waiting.returncode == 0
    check_form("wait", json.loads(output))
