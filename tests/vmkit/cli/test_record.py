"""`up --record DIR`: the folder is checked before anything starts, and is in the machine's record for vsh."""

from pathlib import Path

import pytest

from tests.other_user import ask_as_other
from tests.vmkit.cli.conftest import Vmkit
from vmkit.machine.machine import Machine
from vmkit.machine.options import make_spec
from vmkit.machine.parts.recording import RecordingPart
from vsh.registry import find_machine, read_machines


def test_folder_is_in_the_machines_record(up: Vmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert up("ready-and-let-go", "-q", "--record", "here").status == 0
    machine = find_machine(name="my")
    assert machine is not None
    # vsh runs in another directory.
    assert machine.recordings == str(tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_machine_without_one_is_not_recorded(up: Vmkit) -> None:
    assert up("ready-and-let-go", "-q").status == 0
    machine = find_machine(name="my")
    assert machine is not None
    assert machine.recordings == ""


def test_folder_that_cannot_be_used_is_refused_before_anything_starts(up: Vmkit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file", "it is not a directory"),
        (tmp_path / "none/deep", f"{tmp_path}/none is not a directory"),
    ):
        done = up("ready-and-let-go", "--record", str(path))
        assert done.status != 0
        assert f"vmkit: cannot record into {path}: {reason}" in done.err
        assert read_machines() == []


@pytest.mark.root
def test_folder_of_another_is_refused() -> None:
    part, spec = RecordingPart(), make_spec("tiny", {"record": "/recordings"})
    assert ask_as_other(lambda: part.check_host(spec)).startswith(
        "HostError: cannot record into /recordings: you may not"
    )


def test_python_takes_a_path(tmp_path: Path) -> None:
    assert Machine("tiny", record=tmp_path).spec.record == tmp_path
    assert Machine("tiny", record="a").spec.record == Path("a").absolute()
