"""The verbs of machines that stay, and how the others name such a machine."""

import json
import os
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from vmkit.machine.registry import reserve
from vmkit.stored.store import RECORD, lock_stored, read_stored


@pytest.fixture
def root(folders: Path) -> str:
    folder = folders / "root"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/hostname").write_text("mine\n")
    return str(folder)


def test_machine_is_created_listed_and_removed(root: str, vmkit: Vmkit) -> None:
    done = vmkit("create", "web", root, "--disk-size", "20G", "--memory", "1G", "--token")
    assert (done.status, done.out) == (0, "web is created: a disk of 20 GiB\nstart it:  vmkit up web\n")
    assert vmkit("list").out == ""
    done = vmkit("list", "--all")
    assert [line.split()[:3] for line in done.out.splitlines()] == [["NAME", "CID", "STATE"], ["web", "-", "stopped"]]
    (shown,) = json.loads(vmkit("list", "--all", "--json").out)
    check_form("stored", shown)
    assert (shown["state"], shown["disk_bytes"], shown["source"]) == ("stopped", 20 << 30, root)
    # What has its default was not asked for: a later vmkit may have a better one.
    assert shown["options"] == {"memory": "1G", "token": True}
    done = vmkit("create", "web", root)
    assert (done.status, done.err.splitlines()[0]) == (1, "vmkit: there is a stored machine 'web' already")
    assert vmkit("rm", "web").out == "web is removed\n"
    assert json.loads(vmkit("list", "--all", "--json").out) == []


def test_new_machine_is_printed_in_json(root: str, vmkit: Vmkit) -> None:
    shown = json.loads(vmkit("create", "web", root, "--json", "-q").out)
    check_form("stored", shown)
    assert shown["name"] == "web"


def test_running_machine_is_not_removed_and_others_are(root: str, vmkit: Vmkit) -> None:
    for name in ("a", "b"):
        vmkit("create", name, root, "-q")
    with lock_stored(read_stored("a")) as fd:
        copy = os.dup(fd)
    done = vmkit("rm", "a", "b", "a")
    assert (done.status, done.out) == (1, "b is removed\n")
    assert done.err.startswith("vmkit: the machine 'a' is running\n")
    assert done.err.endswith("hint: vmkit down a\n")
    assert json.loads(vmkit("list", "--all", "--json").out)[0]["state"] == "running"
    os.close(copy)
    done = vmkit("rm", "b", "c")
    assert done.err.startswith("vmkit: 2 machines were not removed\n")


def test_damaged_machine_is_listed_and_does_not_start(root: str, vmkit: Vmkit) -> None:
    vmkit("create", "web", root, "-q")
    (read_stored("web").folder / RECORD).write_text("{")
    (shown,) = json.loads(vmkit("list", "--all", "--json").out)
    check_form("stored", shown)
    assert (shown["state"], shown["options"]) == ("damaged", {})
    done = vmkit("up", "web")
    assert done.status == 1
    assert done.err.startswith("vmkit: the record of the machine 'web' is damaged: ")


def test_up_takes_options_for_one_start_and_refuses_what_does_not_fit(root: str, vmkit: Vmkit) -> None:
    vmkit("create", "web", root, "-q", "--cpus", "2")
    done = vmkit("up", "web", "--name", "other")
    assert (done.status, done.err.splitlines()[0]) == (
        64,
        "vmkit: --name does not fit 'web', which is a stored machine",
    )
    # A wrong value is refused as ever.
    assert "--cpus must be between 1 and 255, not 0" in vmkit("up", "web", "--cpus", "0").err


def test_names_are_completed(root: str, vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch) -> None:
    vmkit("create", "tidy", root, "-q")

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_VMKIT_COMPLETE", "zsh_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(("vmkit", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with monkeypatch.context():
            lines = vmkit().out.splitlines()
        monkeypatch.delenv("_VMKIT_COMPLETE")
        return lines[1::3]

    assert complete("up", "ti") == ["tidy", "tiny"]
    assert complete("rm", "t") == ["tidy"]


def test_user_without_a_home_starts_and_lists_other_machines(
    vmkit: Vmkit, fake_qemu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "VMKIT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    words = "there is no home directory to keep machines in"
    for verb in (["up", "tiny", "--dry-run"], ["list", "--all"], ["prune"], ["doctor"]):
        done = vmkit(*verb)
        assert words not in done.out + done.err
    checks = {check["name"]: check for check in json.loads(vmkit("doctor", "--json").out)["checks"]}
    assert checks["storage"]["level"] == "ok"
    for verb in (["create", "web", "./root"], ["rm", "web"]):
        done = vmkit(*verb)
        assert (done.status, words in done.err) == (1, True)


def test_storage_that_cannot_be_counted_does_not_break_the_host(folders: Path, vmkit: Vmkit, fake_qemu: Path) -> None:
    (folders / "data/machines").mkdir()
    (folders / "data/machines").chmod(0o777)
    checks = {check["name"]: check for check in json.loads(vmkit("doctor", "--json").out)["checks"]}
    assert checks["storage"]["level"] == "fallback"
    assert "other users can write to the data folder" in checks["storage"]["text"]


def test_stopped_machine_is_listed_beside_another_of_its_name(root: str, vmkit: Vmkit) -> None:
    vmkit("create", "web", root, "-q")
    with reserve(None, None, "web", {"backend": "user"}) as reservation:
        # A machine without a name takes that of no stored one.
        assert reservation.name == "web-2"
    with reserve("web", None, "any", {"backend": "user"}):
        shown = [(one["name"], one["state"]) for one in json.loads(vmkit("list", "--all", "--json").out)]
    assert shown == [("web", "starting"), ("web", "stopped")]
