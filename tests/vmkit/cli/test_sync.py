"""`vmkit sync` with a real vshd behind a machine of the registry."""

import json
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from tests.vmkit.cli.test_completion import complete
from tests.vmkit.cli.test_cp import OWN, machine, server
from tests.vmkit.copy.test_sync import fill
from tests.vmkit.forward.test_forward import FakeMachine

__all__ = ["machine", "server"]


@pytest.fixture
def sides(tmp_path: Path) -> list[str]:
    """Two directories that differ, as words."""
    fill(tmp_path / "src", {"a": "new", "b": "b", "c.o": "c"})
    fill(tmp_path / "dst", {"b": "b", "old\n\x1b[2J": "old"})
    return [str(tmp_path / "src"), f"m:{tmp_path}/dst"]


def test_sync_is_quiet_and_lists_when_asked(
    vmkit: Vmkit, machine: FakeMachine, tmp_path: Path, sides: list[str]
) -> None:
    (tmp_path / "list").write_text("*.o\n")
    words = [*OWN, *sides, "--delete", "--exclude-from", str(tmp_path / "list"), "--exclude", "nothing"]
    done = vmkit("sync", "-n", *words)
    assert (done.status, done.err) == (0, "")
    # A name with control characters is shown without them.
    assert sorted(done.out.splitlines()) == ["copy a", "delete old"]
    assert not (tmp_path / "dst/a").exists()
    done = vmkit("sync", "-v", *words)
    assert (done.status, sorted(done.out.splitlines()), done.err) == (0, ["copy a", "delete old"], "")
    assert (tmp_path / "dst/a").read_text() == "new"
    done = vmkit("sync", *words)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == ["a", "b"]


def test_summary_is_json(vmkit: Vmkit, machine: FakeMachine, sides: list[str]) -> None:
    done = vmkit("sync", "--json", "-n", *OWN, *sides)
    value = json.loads(done.out)
    check_form("sync", value)
    assert value["dry_run"]
    assert sorted(one["path"] for one in value["actions"]) == ["a", "c.o"]
    done = vmkit("sync", "--json", *OWN, *sides)
    value = json.loads(done.out)
    check_form("sync", value)
    assert value.pop("seconds") > 0
    counts = {"files": 2, "directories": 0, "links": 0, "bytes": 4, "changed": 0, "deleted": 0, "unchanged": 1}
    assert value == {**counts, "skipped": [], "failed": 0, "dry_run": False}


def test_failure_is_an_error_and_part_of_the_summary(
    vmkit: Vmkit, machine: FakeMachine, tmp_path: Path, sides: list[str]
) -> None:
    (tmp_path / "dst/a").mkdir()
    done = vmkit("sync", "--json", *OWN, *sides)
    assert done.status == 1
    reason = "the destination has a directory of this name, which --delete replaces"
    assert done.err == f"vmkit: cannot sync {tmp_path}/src/a: {reason}\n"
    check_form("sync", json.loads(done.out))
    assert json.loads(done.out)["failed"] == 1


@pytest.mark.parametrize(
    ("words", "brief"),
    [
        (["a", "b"], "neither a nor b is on a machine"),
        (["--exclude", "!", "a", "m:b"], "the pattern '!' is not valid"),
        (["--exclude-from", "none", "a", "m:b"], "cannot read none: No such file or directory"),
    ],
)
def test_bad_words_are_refused(vmkit: Vmkit, words: list[str], brief: str) -> None:
    done = vmkit("sync", *words)
    assert (done.status, done.out) == (64, "")
    assert brief in done.err


def test_words_are_completed(machine: FakeMachine) -> None:
    assert complete("sync", "m") >= {"m:"}
