"""Machine.push, pull and open with a real vshd behind a machine of the registry."""

import os
from pathlib import Path

import pytest

from tests.vmkit.cli.test_cp import machine, server
from tests.vmkit.copy.conftest import show
from tests.vmkit.copy.test_copy import make_tree
from tests.vmkit.forward.test_forward import FakeMachine
from tests.vsh.live import DEFAULT_USER
from vmkit.errors import ConfigError, VmkitError
from vmkit.machine.running import RunningMachine, find_machine

__all__ = ["machine", "server"]


@pytest.fixture
def running(machine: FakeMachine) -> RunningMachine:
    return find_machine("m")


def test_push_and_pull_bring_a_tree_back(running: RunningMachine, tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    running.push(str(tree), str(tmp_path / "there"), user=DEFAULT_USER)
    running.pull(str(tmp_path / "there"), str(tmp_path / "back"), user=DEFAULT_USER)
    assert show(tmp_path / "back") == show(tree)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".vmkit")]


def test_push_adds_to_a_directory_and_replaces_a_file(running: RunningMachine, tmp_path: Path) -> None:
    for name, text in (("new/a", "new"), ("old/a", "old"), ("old/b", "old")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    running.push(str(tmp_path / "new"), str(tmp_path / "old"), user=DEFAULT_USER)
    running.push(str(tmp_path / "new/a"), str(tmp_path / "old/b"), user=DEFAULT_USER)
    assert sorted(path.read_text() for path in (tmp_path / "old").iterdir()) == ["new", "new"]


def test_failure_leaves_the_old_copy(running: RunningMachine, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    before = set(os.listdir(tmp_path))
    with pytest.raises(VmkitError, match="No such file or directory"):
        running.pull(str(tmp_path / "none"), str(tmp_path / "old"), user=DEFAULT_USER)
    with pytest.raises(ConfigError, match="it is a directory"):
        running.pull(str(tmp_path / "old"), str(tmp_path / "folder"), user=DEFAULT_USER)
    with pytest.raises(ConfigError, match="No such file or directory"):
        running.pull(str(tmp_path / "old"), str(tmp_path / "no/where"), user=DEFAULT_USER)
    with pytest.raises(VmkitError, match="No such file or directory"):
        running.push(str(tmp_path / "none"), str(tmp_path / "old"), user=DEFAULT_USER)
    with pytest.raises(VmkitError, match="not an existing directory"):
        running.push(str(tmp_path / "old"), str(tmp_path / "no/where"), user=DEFAULT_USER)
    assert (tmp_path / "old").read_text() == "old"
    assert set(os.listdir(tmp_path)) == before


def test_file_of_the_guest_is_opened(running: RunningMachine, tmp_path: Path) -> None:
    with running.open(str(tmp_path / "f"), "w", encoding="utf-8", user=DEFAULT_USER) as file:
        file.write("text")
    with running.open(str(tmp_path / "f"), user=DEFAULT_USER) as file:
        assert file.read() == b"text"
