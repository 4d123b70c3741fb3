"""A machine is saved and started again, with a QEMU and a guest that play: what a save leaves, and what ends one."""

import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vmkit.machine.conftest import Boot
from tests.vmkit.machine.test_source import make_root
from tests.vmkit.machine.test_start import entries
from tests.vshd.test_init import needs_namespace
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.restore import open_store
from vmkit.machine.save import SAVED_ARGUMENT, HasSystemdError, Made, make_snapshot
from vmkit.machine.spec import Accelerator, Backend, DiskSpec, MachineSpec
from vmkit.machine.start import start_machine
from vmkit.snapshots.store import FILES
from vsh.registry import read_machines

SPEC = MachineSpec(
    append="fake=ready-to-be-saved", accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=20.0, memory_mib=64
)


def save(image: BuiltImage, spec: MachineSpec = SPEC, name: str = "") -> Made:
    return make_snapshot(spec, name=name, build=lambda _image, _tell: image)


def check_nothing_is_left(folders: Path) -> None:
    assert open_store().read_all() == []
    # The next start removes the directory of a monitor that was killed.
    assert read_machines() == []
    assert list((folders / "cache/snapshots/tmp").iterdir()) == []


def test_saved_machine_starts_from_its_snapshot(
    boot: Boot, image: BuiltImage, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = save(image)
    assert (made.was_there, entries(folders)) == (False, [])
    assert {path.name for path in made.snapshot.folder.iterdir()} == set(FILES)
    # One page of 64 MiB, and the state.
    assert made.snapshot.record.file_bytes == 4096 + 32
    assert save(image).was_there
    monkeypatch.setenv("FAKE_RESTORE", "thaw")
    started = boot("ready-to-be-saved", memory_mib=64, token=True)
    assert (started.started_by, started.snapshot) == ("snapshot", made.snapshot.name)
    (entry,) = read_machines()
    assert entry.record["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
    assert (started.directory / "token").exists()


def test_machine_of_a_root_is_told_that_it_will_be_saved(
    boot: Boot, image: BuiltImage, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word makes its init cover the boot id of the root. The key does not have the word: `up` has none either."""
    given = replace(image, name="any", takes_root=True)
    spec = replace(SPEC, image="any", root=make_root("ext4", tmp_path / "root.img"))
    monkeypatch.setenv("FAKE_APPEND_FILE", str(tmp_path / "append"))
    made = save(given, spec)
    assert (tmp_path / "append").read_text().split()[-1] == SAVED_ARGUMENT
    assert SAVED_ARGUMENT not in json.dumps(made.snapshot.record.facts)
    assert made.snapshot.record.image == str(spec.root)
    monkeypatch.setenv("FAKE_RESTORE", "thaw")
    with start_machine(spec, build=lambda _image, _tell: given).monitor as monitor:
        (entry,) = read_machines()
        assert entry.record["started_by"] == "snapshot"
        stop.kill(entry)
        monitor.wait(10)


def test_root_whose_systemd_is_pid_1_is_not_saved(image: BuiltImage, folders: Path, tmp_path: Path) -> None:
    """READY comes before systemd has done anything. A pool catches the error, and boots its machines."""
    root = make_root("ext4", tmp_path / "root.img")
    spec = replace(SPEC, image="any", root=root, append="fake=ready-with-systemd")
    with pytest.raises(HasSystemdError, match="its pid 1 is the systemd of its root"):
        save(replace(image, name="any", takes_root=True), spec)
    check_nothing_is_left(folders)


def test_root_is_not_saved_under_a_name(image: BuiltImage, tmp_path: Path) -> None:
    spec = replace(SPEC, image="any", root=make_root("ext4", tmp_path / "root.img"))
    with pytest.raises(ConfigError, match="a snapshot with a name is of an image") as caught:
        save(replace(image, name="any", takes_root=True), spec, name="mine")
    assert "vmkit snapshot make" in caught.value.hint


def test_qemu_that_dies_in_the_thaw_is_a_line_and_a_boot(
    boot: Boot,
    image: BuiltImage,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(image)
    monkeypatch.setenv("FAKE_RESTORE", "die-in-the-thaw")
    with caplog.at_level(logging.WARNING, "vmkit"):
        assert boot("ready-to-be-saved", memory_mib=64).started_by == "boot"
    (record,) = caplog.records
    assert "QEMU ended with signal 9" in record.getMessage()
    assert entries(folders) == ["tiny"]
    assert open_store().read_all() == []


def test_builders_at_once_make_one_snapshot(image: BuiltImage, folders: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: save(image), range(3)))
    assert sorted(one.was_there for one in made) == [False, True, True]
    assert len({one.snapshot.folder for one in made}) == 1
    assert entries(folders) == []


def test_builders_at_once_save_equal_machines_under_several_names(image: BuiltImage, folders: Path) -> None:
    names = ["", "first", "second"]
    with ThreadPoolExecutor(len(names)) as pool:
        made = list(pool.map(lambda name: save(image, name=name), names))
    assert [one.was_there for one in made] == [False, False, False]
    assert len({one.snapshot.record.key for one in made}) == 1
    assert [one.name for one in open_store().read_all()] == ["first", "second", made[0].snapshot.name]
    assert entries(folders) == []


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("die-at-the-state", "QEMU ended with signal 9"),
        ("refuse-the-state", "QEMU refused the state of the machine"),
        ("kill-the-monitor", "the monitor is gone"),
    ],
)
def test_process_that_fails_in_a_save_leaves_no_snapshot(
    image: BuiltImage, folders: Path, monkeypatch: pytest.MonkeyPatch, fake: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_SAVE", fake)
    with pytest.raises(MachineError, match=f"^'saving-.*' was not saved: .*{said}"):
        save(image, name="half")
    check_nothing_is_left(folders)


def test_disk_that_changes_while_its_machine_is_saved_is_no_snapshot(
    image: BuiltImage, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    monkeypatch.setenv("FAKE_SAVE", f"append-to:{disk}")
    with pytest.raises(MachineError, match="no snapshot was made: a kernel or a disk changed meanwhile"):
        save(image, replace(SPEC, disks=(DiskSpec(disk),)))
    check_nothing_is_left(folders)


# Its snapshots are in a small file system of their own.
FULL_DISK = """
import json, os, sys
from pathlib import Path
from tests.vmkit.machine.test_save import SPEC
from vmkit.image.build import BuiltImage
from vmkit.machine.save import make_snapshot
from vsh.errors import VshError
kernel = Path(sys.argv[1])
image = BuiltImage("tiny", kernel, kernel, kernel, (), "root", "0" * 64, True)
folder = Path(os.environ["VMKIT_SNAPSHOTS_DIR"])
try:
    make_snapshot(SPEC, build=lambda i, t: image)
except VshError as error:
    print(error.brief)
files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
print(json.dumps(files))
"""
MOUNT = 'mount -t tmpfs -o mode=700,size="$0" none "$VMKIT_SNAPSHOTS_DIR" && exec "$@"'


@needs_namespace
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("70m", "the disk of .* has too little room for a snapshot of 64 MiB"),
        ("90m", "'saving-.*' was not saved: cannot write the snapshot: No space left on device"),
    ],
)
def test_full_disk_is_no_snapshot(
    fake_qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, said: str
) -> None:
    """Full at the beginning, and filled by another while the machine is saved."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"")
    folder = tmp_path / "small"
    folder.mkdir()
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(folder))
    monkeypatch.setenv("FAKE_SAVE", f"fill:{folder}/filler")
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, size]
    argv += [sys.executable, "-c", FULL_DISK, str(kernel)]
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=True)
    brief, files = done.stdout.splitlines()
    assert re.fullmatch(said, brief), done.stdout + done.stderr
    assert {name.split("/")[0] for name in json.loads(files)} <= {"flock", "filler"}
    assert entries(fake_qemu) == []


def test_snapshots_can_have_a_folder_of_their_own(
    image: BuiltImage, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(tmp_path / "large disk"))
    made = save(image)
    assert made.snapshot.folder.is_relative_to(tmp_path / "large disk")
    assert not (folders / "cache" / "snapshots").exists()


def test_folder_of_snapshots_that_others_can_write_to_is_refused(
    image: BuiltImage, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(tmp_path))
    with pytest.raises(HostError, match="snapshots folder") as caught:
        save(image)
    assert "VMKIT_SNAPSHOTS_DIR=DIR" in caught.value.hint
