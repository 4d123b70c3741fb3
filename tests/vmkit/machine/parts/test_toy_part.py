"""A new part is a file and a row: the real program and the real monitor do the rest, with a QEMU that boots nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.vmkit.cli.conftest import archive, built, fake_qemu, folders, recipe
from tests.vsh.live import CHECKOUT, wait_until
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.registry import find_state_directory
from vsh.registry import find_machine, read_machines

__all__ = ["archive", "built", "fake_qemu", "folders", "recipe"]

DEADLINE_S = 60
# The one row.
VMKIT = """
import sys
from tests.vmkit.machine.parts.toy import ToyPart
from vmkit.machine.parts import table
table.PARTS = (*table.PARTS, ToyPart())
from vmkit.__main__ import main
sys.exit(main())
"""


def vmkit(*words: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-c", VMKIT, *words]
    return subprocess.run(argv, check=False, cwd=CHECKOUT, capture_output=True, text=True, timeout=DEADLINE_S)


def up(recipe: str, *words: str) -> "subprocess.CompletedProcess[str]":
    fixed = ("--accel", "tcg", "--backend", "user", "--append", "fake=ready-and-let-go", "--name", "m")
    return vmkit("up", recipe, *fixed, *words)


def read_events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / Layout.EVENTS).read_text().splitlines()]


def find_toys(folder: Path) -> list[int]:
    """The processes that were started, in their order."""
    return [int(str(event["pid"])) for event in read_events(folder) if event["event"] == "toy-started"]


def test_toy_is_an_option_of_the_command_line() -> None:
    words = " ".join(vmkit("up", "--help").stdout.split())
    assert "--toy COLOUR Wind up a toy of this colour." in words


def test_toy_is_checked_before_anything_starts(recipe: str) -> None:
    done = up(recipe, "--toy", "grey")
    assert "no toy is grey" in done.stderr
    assert done.returncode != 0
    assert read_machines() == []


def test_toy_is_planned_plugged_and_recorded(recipe: str) -> None:
    done = up(recipe, "--toy", "red")
    assert done.returncode == 0, done.stderr
    machine = find_machine(name="m")
    assert machine is not None
    assert machine.record["toy"] == "red"
    folder = Path(machine.directory)
    argv = (folder / Layout.ARGV).read_text().splitlines()[0]
    assert "-object toy-box,id=box" in argv
    assert "toy.colour=red" in argv
    qmp = (folder / Layout.QMP_LOG).read_text()
    assert qmp.index('"toy-fd"') < qmp.index('"vhost-user-toy-pci"')
    wait_until(lambda: (folder / "toy.log").read_text() == "a red toy\n", "the toy speaks")


def test_companion_of_the_toy_is_watched_replaced_and_stopped(recipe: str) -> None:
    assert up(recipe, "--toy", "blue").returncode == 0
    machine = find_machine(name="m")
    assert machine is not None
    folder = Path(machine.directory)
    (first,) = find_toys(folder)
    os.kill(first, 9)
    wait_until(lambda: "toy-replaced" in {event["event"] for event in read_events(folder)}, "the toy is replaced")
    wait_until(lambda: len(find_toys(folder)) == 2, "the second toy is announced")
    second = find_toys(folder)[1]
    qmp = (folder / Layout.QMP_LOG).read_text()
    assert qmp.index('"device_del"') < qmp.index('"chardev-remove"') < qmp.rindex('"vhost-user-toy-pci"')
    stop.kill(machine)
    wait_until(lambda: not Path(f"/proc/{second}").exists(), "no toy is left")
    assert read_machines() == []


def test_toy_that_was_not_asked_for_is_not_there(recipe: str) -> None:
    assert up(recipe).returncode == 0
    machine = find_machine(name="m")
    assert machine is not None
    assert machine.record["toy"] is None
    assert "toy" not in (Path(machine.directory) / Layout.ARGV).read_text()
    assert find_toys(Path(machine.directory)) == []


def test_log_of_the_toy_is_kept_with_the_others(recipe: str) -> None:
    assert up(recipe, "--toy", "green").returncode == 0
    machine = find_machine(name="m")
    assert machine is not None
    os.kill(int(str(machine.record["qemu_pid"])), 9)
    kept = find_state_directory() / "m" / "toy.log"
    wait_until(kept.exists, "the logs are kept")
    wait_until(lambda: kept.read_text() == "a green toy\n", "the toy's, too")
    assert vmkit("logs", "m", "--kind", "toy").stdout == "a green toy\n"


def test_log_of_the_toy_is_one_that_logs_prints(recipe: str) -> None:
    assert up(recipe, "--toy", "red").returncode == 0
    machine = find_machine(name="m")
    assert machine is not None
    wait_until(lambda: (Path(machine.directory) / "toy.log").read_text() == "a red toy\n", "the toy speaks")
    assert vmkit("logs", "m", "--kind", "toy").stdout == "a red toy\n"
    shown = " ".join(vmkit("logs", "--help").stdout.split())
    assert "|toy|virtiofsd|vsock]" in shown and "(vsock, virtiofsd, toy)" in shown


def test_log_of_an_earlier_toy_does_not_stay_with_the_logs_of_a_machine_without_it(recipe: str) -> None:
    for words in (["--toy", "green"], []):
        assert up(recipe, *words).returncode == 0
        machine = find_machine(name="m")
        assert machine is not None
        os.kill(int(str(machine.record["qemu_pid"])), 9)
        assert stop.wait_for_end(machine, DEADLINE_S) is not None
        wait_until(lambda: read_machines() == [], "the machine is gone")
        assert (find_state_directory() / "m" / "toy.log").exists() == bool(words)
