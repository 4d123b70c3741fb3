"""A machine that ended is named as the cause, wherever its loss is met: vsh, the Python API, the verbs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import vmkit
from vmkit.errors import MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import machine as machine_module
from vmkit.machine import stop
from vmkit.machine.registry import MAX_ENDINGS, write_ending
from vmkit.machine.running import pick_entry
from vmkit.machine.start import Started, start_machine
from vsh.ending import await_ending, describe_last, explain_loss, read_ending
from vsh.errors import Unreachable
from vsh.registry import find_machine

Boot = Callable[..., Started]
PANIC = "the guest's kernel panicked: Fatal exception"


@pytest.fixture
def make_machine(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], vmkit.Machine]:
    build = partial(start_machine, build=lambda _image, _tell: image)
    monkeypatch.setattr(machine_module, "start_machine", build)
    return lambda scenario: vmkit.Machine("tiny", accelerator="tcg", backend="user", append=f"fake={scenario}")


def run_vsh(*words: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "vsh", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_vsh_names_the_panic_with_the_consoles_last_lines(boot: Boot) -> None:
    """The fake guest has no vshd: vsh waits for an answer until the kernel panics, or comes when that is over."""
    started = boot("ready-then-panic")
    first = run_vsh("--vm_name", "tiny", "--", "true")
    assert (first.returncode, PANIC in first.stderr) == (1, True)
    started.monitor.wait(10)
    again = run_vsh("--vm_name", "tiny", "--", "true").stderr.splitlines()
    assert again[0] == "vsh: no machine named 'tiny' is running"
    assert again[1].startswith("  the last machine of that name ended ")
    assert again[1].endswith(f" s ago: {PANIC}")


def test_machine_that_is_stopping_is_explained_by_its_end(boot: Boot) -> None:
    started = boot("ready-then-panic")
    entry = find_machine(name="tiny")
    assert entry is not None
    error = Unreachable("nothing listens")
    explain_loss(error, entry)
    started.monitor.wait(10)
    assert error.brief == f"machine 'tiny' has ended: {PANIC}"
    assert error.details.splitlines()[0] == "the console's last lines:"
    assert "Comm: swapper/0" in error.details
    assert error.hint == "see its logs: vmkit logs tiny"


def test_python_names_the_panic_at_once_and_later(make_machine: Callable[[str], vmkit.Machine]) -> None:
    with make_machine("ready-then-panic") as machine:
        with pytest.raises((Unreachable, MachineError)) as first:
            machine.run(["true"])
        assert PANIC in first.value.brief
        assert "Comm: swapper/0" in first.value.details
        with pytest.raises(MachineError) as later:
            machine.run(["true"])
        assert later.value.brief == f"'tiny' is not running any more: {PANIC}"
        assert "Comm: swapper/0" in later.value.details
        assert later.value.hint == "see why: vmkit logs tiny"


def test_end_that_the_guest_wanted_is_named_without_alarm(boot: Boot) -> None:
    boot("ready-then-power-off")
    done = run_vsh("--vm_name", "tiny", "--", "true")
    assert "the guest powered off" in done.stderr
    assert "console" not in done.stderr


def test_machine_that_goes_on_changes_nothing(boot: Boot) -> None:
    boot("ready")
    machine = find_machine(name="tiny")
    assert machine is not None
    assert await_ending(machine, 0.05) is None
    done = run_vsh("--vm_name", "tiny", "--connect_timeout=0.3", "--", "true")
    assert done.stderr.startswith("vsh: machine 'tiny' does not answer\n")


def test_monitor_that_was_killed_is_named(boot: Boot) -> None:
    started = boot("ready")
    machine = find_machine(name="tiny")
    assert machine is not None
    os.kill(machine.pid, signal.SIGKILL)
    started.monitor.wait(10)
    ending = await_ending(machine)
    assert ending is not None
    assert (ending.brief, ending.is_expected) == ("its monitor was killed", False)


def test_end_of_a_later_machine_of_the_name_is_not_taken_for_it(boot: Boot) -> None:
    boot("ready")
    first = find_machine(name="tiny")
    assert first is not None
    stop.kill(first)
    started = boot("ready-then-panic")
    started.monitor.wait(10)
    assert read_ending("tiny", first.pid) is None
    assert read_ending("tiny", started.monitor.pid) is not None


def test_name_of_a_machine_that_ended_is_explained(boot: Boot) -> None:
    boot("ready-then-panic").monitor.wait(10)
    with pytest.raises(MachineError, match="no machine named 'tiny' is running") as caught:
        pick_entry("tiny")
    assert caught.value.details.endswith(f"ago: {PANIC}")


@pytest.mark.parametrize("name", ["nobody", "../machines/x", "a\0b", ""])
def test_name_of_no_machine_has_no_end(folders: Path, name: str) -> None:
    assert describe_last(name) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"brief": 1}', '{"brief": "x", "expected": 1, "pid": "y"}'])
def test_damaged_word_of_an_end_is_none(folders: Path, text: str) -> None:
    (folders / "runtime" / "ends").mkdir()
    (folders / "runtime" / "ends" / "m.json").write_text(text)
    assert read_ending("m") is None


def test_words_of_ends_are_bounded_in_number(folders: Path) -> None:
    machines = folders / "runtime" / "machines"
    for number in range(MAX_ENDINGS + 5):
        write_ending(machines / f"m{number}", {"brief": "x", "expected": True, "pid": number})
    folder = folders / "runtime" / "ends"
    assert len(list(folder.iterdir())) == MAX_ENDINGS
    last = folder / f"m{MAX_ENDINGS + 4}.json"
    assert json.loads(last.read_text())["name"] == last.stem
    assert last.stat().st_mode & 0o777 == 0o600
    assert read_ending("m0") is None


def test_end_cannot_be_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "ends").write_text("in the way")
    write_ending(tmp_path / "machines" / "m", {"brief": "x"})
    assert (tmp_path / "ends").read_text() == "in the way"
