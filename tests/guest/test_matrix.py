"""`vmkit matrix` on real machines."""

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

from tests.docs.schemas import check_form
from tests.guest.conftest import Run
from vsh.registry import read_machines

MATRIX = """
backends = ["user"]
fresh = true
[commands]
passes = "uname -s"
fails = "echo said; exit 3"
hostile = ["printf", '\\033]0;owned\\007\\033[31mred\\033[0m']
missing = ["\\u009b2J\\u202enothing"]
"""


def test_matrix_tells_what_passed_and_what_failed(built: None, vmkit: Run, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text(MATRIX)
    known = {machine.name for machine in read_machines()}
    kept = ("--to", str(tmp_path / "results"))
    done = vmkit("matrix", str(tmp_path / "lab.toml"), "--junit", str(tmp_path / "junit.xml"), *kept)
    assert done.returncode == 1, done.stderr.decode()
    passes, fails, hostile, missing = Xml.parse(tmp_path / "junit.xml").getroot()[0]
    assert str(passes[0].text).strip() == "Linux"
    assert (fails[0].tag, fails[0].get("message"), str(fails[0].text).strip()) == ("failure", "status 3", "said")
    assert str(hostile[0].text).strip() == "red"
    assert missing[0].tag == "error"
    assert not any(letter in done.stdout.decode() + str(missing[0].get("message")) for letter in "\x1b\x9b\u202e")
    assert {machine.name for machine in read_machines()} == known
    # What each cell left, and the report of all.
    record = json.loads((tmp_path / "results/000000/results.json").read_text())
    check_form("matrix-result", record)
    assert (record["verdict"], record["attempt"], record["machine"]["started_by"]) == ("passed", 1, "boot")
    sessions = (tmp_path / "results/000000/sessions.jsonl").read_text().splitlines()
    assert any("uname -s" in json.loads(line)["command"] for line in sessions)
    assert {path.name for path in (tmp_path / "results/000000").iterdir()} >= {"console.log", "events.jsonl"}
    merged = vmkit("matrix", "merge", str(tmp_path / "results"), "--to", str(tmp_path / "report"), "--quiet")
    assert (merged.returncode, merged.stdout) == (1, b"4 cells: 2 passed, 2 failed\n")


PANIC = """
backends = ["user"]
[commands]
before = "echo fine"
panics = "sleep 1; echo c > /proc/sysrq-trigger; sleep 60"
after = "true"
"""


def test_matrix_names_the_panic_under_a_command_and_after_it(built: None, vmkit: Run, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text(PANIC)
    done = vmkit("matrix", str(tmp_path / "lab.toml"), "--junit", str(tmp_path / "junit.xml"))
    assert done.returncode == 1, done.stderr.decode()
    cause = "the guest's kernel panicked: sysrq triggered crash"
    assert done.stdout.decode().count(cause) == 2
    before, panics, after = Xml.parse(tmp_path / "junit.xml").getroot()[0]
    assert str(before[0].text).strip() == "fine"
    for case, what in ((panics, "lost the connection to machine '"), (after, "is not running any more: ")):
        assert case[0].tag == "error"
        assert what in str(case[0].get("message")) and cause in str(case[0].get("message"))
        assert "the console's last lines:" in str(case[0].text)


KTAP = """
backends = ["user"]
ktap = ["selftest"]
[commands]
selftest = "printf 'KTAP version 1\\n1..3\\nok 1 a\\nb begins\\n'; sleep 3; echo c > /proc/sysrq-trigger; sleep 60"
"""


def test_matrix_has_the_tests_until_a_panic(built: None, vmkit: Run, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text(KTAP)
    done = vmkit("matrix", str(tmp_path / "lab.toml"), "--junit", str(tmp_path / "junit.xml"))
    assert done.returncode == 1, done.stderr.decode()
    command, first, second, third = Xml.parse(tmp_path / "junit.xml").getroot()[0]
    panic = "the guest's kernel panicked: sysrq triggered crash"
    assert command[0].tag == "error" and panic in str(command[0].get("message"))
    assert (first.get("classname"), first.get("name"), len(first)) == ("tiny.own.user.selftest", "a", 0)
    assert second[0].text == "b begins"
    assert "was running when the output ended" in str(second[0].get("message"))
    assert panic in str(second[0].get("message"))
    assert third[0].get("message") == "did not run"
