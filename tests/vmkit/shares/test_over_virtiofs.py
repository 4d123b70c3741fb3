"""When virtiofs carries a share, and what virtiofsd is started with."""

import os
from pathlib import Path

import pytest

from vmkit.machine import virtiofsd as programs
from vmkit.machine.virtiofsd import Virtiofsd
from vmkit.shares.over_virtiofs import connect, find_owner, has_mount_below, plan_argv
from vmkit.shares.place import SharedPlace
from vsh.errors import ExecError
from vshd.wire import messages

FAKES = Path(__file__).parents[2] / "fakes/shares"
MOUNTS = """\
24 1 0:22 / /proc rw - proc proc rw
30 1 0:30 / /home/me/my\\040disk/inner rw - tmpfs none rw
31 1 0:31 / /home/me/work rw - tmpfs none rw
"""


def refuse(folder: Path) -> str:
    """Why virtiofs does not carry a folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(ExecError) as refused:
            connect("none", SharedPlace(folder, "/mnt/x"), fd)
    finally:
        os.close(fd)
    # Another transport is tried then.
    assert refused.value.kind == messages.UNSUPPORTED
    return refused.value.brief


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that is not root's."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 1000, 1000)
    return tmp_path


def test_other_file_systems_below_are_seen(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    for path, is_above in [
        *(("/home/me", True), ("/home/me/my disk", True), ("/", True), ("/home/me/work", False)),
        *(("/home/me/my", False), ("/home/me/my disk/inner", False), ("/srv", False)),
    ]:
        assert has_mount_below(path, str(mounts)) == is_above, path
    assert has_mount_below("/srv", str(tmp_path / "none"))


def test_host_without_virtiofsd_takes_another_transport(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(programs, "PLACES", ())
    assert refuse(folder) == "virtiofs cannot carry it: virtiofsd is not installed"
    program = folder / "virtiofsd"
    program.write_text("#!/bin/sh\necho '--fd --readonly'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert "cannot serve a folder" in refuse(folder)


def test_machine_that_has_ended_is_no_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(folder / "none"))
    assert refuse(folder) == "virtiofs cannot carry it: the machine has ended"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_serves_no_folder_of_its_own(tmp_path: Path) -> None:
    assert refuse(tmp_path) == "virtiofs cannot carry it: virtiofsd does not run as root, and the folder is root's"


def test_all_that_the_guest_makes_is_the_owners(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    owner = find_owner(fd)
    os.close(fd)
    assert owner.uid != 0
    argv = plan_argv(Virtiofsd("/v", 5000), "/src", owner, is_read_only=True)
    text = " ".join(argv)
    for words in (
        f"--translate-uid map:0:{owner.uid}:1 --translate-uid squash-guest:1:{owner.uid}:4294967294",
        "--sandbox namespace",
        "--thread-pool-size 0",
        "--rlimit-nofile 5000",
        "--readonly",
    ):
        assert words in text
    assert "--readonly" not in plan_argv(Virtiofsd("/v", 5000), "/src", owner, is_read_only=False)
