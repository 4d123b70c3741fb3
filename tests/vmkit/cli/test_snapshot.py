"""The verbs of snapshots on snapshots of no machine: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from tests.vmkit.snapshots.make import make_snapshot
from vmkit.machine.restore import open_store
from vmkit.snapshots.key import make_key

FACTS = {"qemu": ["/usr/bin/qemu", 1, 2, "7.2.22"], "accelerator": "tcg"}


@pytest.fixture
def made(folders: Path) -> Path:
    return make_snapshot(open_store().find_made(make_key(FACTS)), FACTS)


def test_list_shows_those_with_names_first(vmkit: Vmkit, made: Path) -> None:
    make_snapshot(open_store().find_named("mine"), FACTS)
    lines = vmkit("snapshot", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "mine", made.name[:12]]
    listed = json.loads(vmkit("snapshot", "list", "--json").out)
    check_form("snapshots", listed)
    assert [one["named"] for one in listed] == [True, False]


def test_list_of_none_says_what_to_type(vmkit: Vmkit, folders: Path) -> None:
    done = vmkit("snapshot", "list")
    assert (done.status, done.out) == (0, "")
    assert "vmkit snapshot make" in done.err
    assert json.loads(vmkit("snapshot", "list", "--json").out) == []


def test_show_has_what_it_depends_on(vmkit: Vmkit, made: Path) -> None:
    shown = json.loads(vmkit("snapshot", "show", made.name[:5], "--json").out)
    check_form("snapshots", [shown])
    assert shown["facts"] == FACTS
    assert "/usr/bin/qemu 1 2 7.2.22" in vmkit("snapshot", "show", made.name[:5]).out


def test_rm_removes_all_or_none(vmkit: Vmkit, made: Path) -> None:
    done = vmkit("snapshot", "rm", made.name[:12], "missing")
    assert done.status == 64
    assert "there is no snapshot 'missing'" in done.err
    assert made.exists()
    done = vmkit("snapshot", "rm", made.name[:12])
    assert (done.status, done.out) == (0, f"the snapshot {made.name[:12]} is gone\n")
    assert not made.exists()


def test_prune_keeps_those_with_names(vmkit: Vmkit, made: Path) -> None:
    named = make_snapshot(open_store().find_named("mine"), FACTS)
    assert vmkit("snapshot", "prune").out == "nothing to remove\n"
    assert vmkit("snapshot", "prune", "--all").out == "1 snapshots are gone\n"
    assert named.exists() and not made.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot",),
        ("snapshot", "make", "tiny", "--rwdisk", "/dev/null"),
        ("snapshot", "make", "tiny", "--name", "x"),
        ("snapshot", "save"),
        ("snapshot", "rm"),
        ("up", "tiny", "--boot", "--snapshot", "mine"),
    ],
)
def test_wrong_usage_is_refused(vmkit: Vmkit, folders: Path, words: tuple[str, ...]) -> None:
    assert vmkit(*words).status == 64


@pytest.mark.parametrize("verb", [("make", "web"), ("save", "mine", "--image", "web")])
def test_machine_that_stays_is_not_saved(vmkit: Vmkit, folders: Path, verb: tuple[str, ...]) -> None:
    (folders / "data/machines/web").mkdir(parents=True, mode=0o700)
    done = vmkit("snapshot", *verb)
    assert done.status == 64
    assert "vmkit cannot save the machine 'web': it keeps what its guest writes" in done.err
    assert "vmkit up web" in done.err


@pytest.mark.parametrize("more", [(), ("--console",)])
def test_snapshot_that_is_none_is_no_boot(vmkit: Vmkit, folders: Path, more: tuple[str, ...]) -> None:
    """Nor does --console, which otherwise boots, take the place of the name."""
    done = vmkit("up", "--snapshot", "mine", *more)
    assert done.status == 1
    assert "there is no snapshot 'mine'" in done.err
