"""Which snapshot a machine starts from, and what becomes of one that is of no use: a line, and a boot."""

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.other_user import SOMEBODY_ELSE, ask_as_other
from tests.vmkit.machine.test_start import entries, until
from tests.vmkit.snapshots.make import make_snapshot
from vmkit.errors import ConfigError, MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.choose import Choices, choose
from vmkit.machine.restore import (
    find_facts,
    find_obstacle,
    find_source,
    name_image,
    open_store,
    parse_options,
    render_options,
    take_options,
)
from vmkit.machine.spec import Accelerator, Backend, DiskMode, DiskSpec, MachineSpec, StoredRoot
from vmkit.machine.start import Started
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.snapshots.key import describe_difference, make_key
from vmkit.snapshots.store import MEMORY, RECORD, STATE
from vsh.registry import find_machine

Boot = Callable[..., Started]
SPEC = MachineSpec(append="fake=ready", accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=20.0)


@pytest.fixture
def choices(image: BuiltImage) -> Choices:
    return choose(SPEC, lambda _text, _fraction: None, KernelVhostDoor(), lambda _image, _tell: image)


def make(choices: Choices, spec: MachineSpec = SPEC, **fields: Any) -> Path:
    facts = find_facts(spec, choices)
    fields.setdefault("memory_mib", spec.memory_mib)
    return make_snapshot(open_store().find_made(make_key(facts)), facts, **fields)


# The key.


def rewrite(disk: Path) -> None:
    """Gives a disk other content, at another time: before Linux 6.13 two writes within 4 ms can have the same."""
    time_ns = disk.stat().st_mtime_ns + 10_000_000
    disk.write_bytes(b"x" * disk.stat().st_size)
    os.utime(disk, ns=(time_ns, time_ns))


def test_what_a_machine_has_of_its_own_is_no_fact(choices: Choices) -> None:
    facts = find_facts(SPEC, choices)
    for own in ({"name": "other"}, {"cid": 77}, {"token": True}, {"timeout_s": 5.0}, {"boot": True}):
        assert find_facts(replace(SPEC, **own), choices) == facts
    assert "saving" not in json.dumps(facts) and "token" not in json.dumps(facts)


def test_all_that_a_guest_can_notice_is_a_fact(choices: Choices, tmp_path: Path) -> None:
    facts = find_facts(SPEC, choices)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    others = [
        find_facts(replace(SPEC, memory_mib=128), choices),
        find_facts(replace(SPEC, cpus=2), choices),
        find_facts(replace(SPEC, append="loglevel=7"), choices),
        find_facts(replace(SPEC, cpu="qemu64"), choices),
        find_facts(replace(SPEC, disks=(DiskSpec(disk),)), choices),
        find_facts(SPEC, replace(choices, built=replace(choices.built, digest="1" * 64))),
        find_facts(SPEC, replace(choices, accelerator=Accelerator.KVM)),
        find_facts(SPEC, replace(choices, qemu=replace(choices.qemu, version=(10, 0, 2)))),
    ]
    keys = {make_key(one) for one in (facts, *others)}
    assert len(keys) == 1 + len(others)
    assert describe_difference(facts, others[0]) == "the machine's options"
    assert describe_difference(facts, others[7]) == "QEMU"


def test_disk_whose_content_changed_is_another_fact(choices: Choices, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    spec = replace(SPEC, disks=(DiskSpec(disk),))
    before = find_facts(spec, choices)
    rewrite(disk)
    assert describe_difference(before, find_facts(spec, choices)) == "a kernel or a disk"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"netdev": "user"}, "network"),
        ({"gdb": True}, "gdb"),
        ({"gdb_port": 1234}, "gdb"),
        ({"disks": (DiskSpec(Path("/dev/null"), DiskMode.READ_WRITE),)}, "can write to the disk"),
        ({"disks": (DiskSpec(Path("/dev/null")),)}, "is a device"),
        ({"more": (("toy", "x"),)}, "part"),
    ],
)
def test_machine_that_cannot_be_saved_says_why(choices: Choices, fields: dict[str, Any], said: str) -> None:
    assert find_obstacle(SPEC, choices) == ""
    assert said in find_obstacle(replace(SPEC, **fields), choices)
    assert find_obstacle(SPEC, replace(choices, backend=Backend.VHOST)) == ""


def test_snapshot_of_exactly_this_machine_is_found(choices: Choices) -> None:
    assert find_source(SPEC, choices) is None
    folder = make(choices)
    source = find_source(SPEC, choices)
    assert source is not None and (source.folder, source.is_named) == (folder, False)
    assert find_source(replace(SPEC, boot=True), choices) is None
    assert find_source(replace(SPEC, memory_mib=512), choices) is None
    assert find_source(SPEC, replace(choices, qemu=replace(choices.qemu, version=(10, 0, 2)))) is None
    assert find_source(SPEC, replace(choices, backend=Backend.VHOST)) is None


# A root of a user's.


def give_root(choices: Choices, root: Path) -> tuple[MachineSpec, Choices]:
    """The machine of the image that takes any root, and what it leads to."""
    built = replace(choices.built, name="any", takes_root=True)
    return replace(SPEC, image="any", root=root), replace(choices, built=built, root=root, root_type="ext4")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "root.img"
    path.write_bytes(bytes(4096))
    return path


def test_root_is_a_fact_and_no_obstacle(choices: Choices, disk: Path) -> None:
    spec, given = give_root(choices, disk)
    assert find_obstacle(spec, given) == ""
    before = find_facts(spec, given)
    rewrite(disk)
    assert describe_difference(before, find_facts(spec, given)) == "a kernel or a disk"
    other = give_root(choices, disk.rename(disk.with_name("other.img")))
    assert len({make_key(facts) for facts in (before, find_facts(spec=other[0], choices=other[1]))}) == 2
    # A person sees what was given, and not the disk that vmkit made of it.
    assert name_image(*other) == str(disk.with_name("other.img"))
    assert name_image(replace(other[0], source="oci:/web"), other[1]) == "oci:/web"
    assert name_image(SPEC, choices) == "tiny"


def test_root_that_can_change_under_a_snapshot_says_why(choices: Choices, disk: Path, tmp_path: Path) -> None:
    spec, given = give_root(choices, disk)
    assert "/dev/null is a device" in find_obstacle(*give_root(choices, Path("/dev/null")))
    assert "a folder of the host" in find_obstacle(replace(spec, root=None, root_from=tmp_path), given)
    stored = StoredRoot("web", tmp_path, disk, "raw", "ext4")
    assert "it keeps what its guest writes" in find_obstacle(replace(spec, stored=stored), given)
    assert "cloud-init" in find_obstacle(replace(spec, user_data=disk), given)
    writable = (DiskSpec(disk, DiskMode.READ_WRITE),)
    assert "can write to the disk" in find_obstacle(replace(spec, disks=writable), given)


def test_machine_without_systemd_takes_the_snapshot_of_one_that_found_none(choices: Choices, disk: Path) -> None:
    """`vmkit run` asks for no systemd. One that looked for systemd was saved only where there is none."""
    spec, given = give_root(choices, disk)
    folder = make(given, spec)
    source = find_source(replace(spec, init="none"), given)
    assert source is not None and source.folder == folder
    assert find_source(replace(spec, init="systemd"), given) is None
    assert find_source(replace(spec, init="none", memory_mib=512), given) is None


# One of no use.


def start_from(run: Boot, monkeypatch: pytest.MonkeyPatch, restore: str, **fields: Any) -> Started:
    """Starts SPEC's machine, whose QEMU plays `restore` when it is given a state."""
    monkeypatch.setenv("FAKE_RESTORE", restore)
    return run("ready", **fields)


@pytest.mark.parametrize(
    ("restore", "damaged", "said"),
    [
        ("refuse-state", "", "QEMU refused the state of the machine"),
        ("exit-at-once", "", "QEMU ended with status 1"),
        ("die-at-the-state", "", "QEMU ended with signal 9"),
        ("ready", MEMORY, "the snapshot is damaged: its memory differs at byte 0"),
        ("ready", STATE, "the snapshot is damaged: the state of its devices differs"),
        ("ready", RECORD, "the snapshot is damaged"),
    ],
)
def test_snapshot_of_no_use_is_a_line_and_a_boot(
    boot: Boot,
    choices: Choices,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    restore: str,
    damaged: str,
    said: str,
) -> None:
    folder = make(choices)
    if damaged:
        data = bytearray((folder / damaged).read_bytes())
        data[40] ^= 1
        (folder / damaged).write_bytes(data)
    with caplog.at_level(logging.WARNING, "vmkit"):
        started = start_from(boot, monkeypatch, restore)
    assert (started.started_by, started.snapshot, started.name) == ("boot", None, "tiny")
    (record,) = caplog.records
    assert said in record.getMessage() and record.getMessage().endswith("; the machine boots instead")
    assert not folder.exists()
    assert entries(folders) == ["tiny"]
    assert start_from(boot, monkeypatch, "unused", name="second").started_by == "boot"
    assert len(caplog.records) == 1


def test_guest_that_does_not_thaw_in_time_is_a_line_and_a_boot(
    boot: Boot, choices: Choices, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(choices)
    with caplog.at_level(logging.WARNING, "vmkit"):
        assert start_from(boot, monkeypatch, "silent", timeout_s=6.0).started_by == "boot"
    (record,) = caplog.records
    assert "the guest was not ready within 6 s; the machine boots instead" in record.getMessage()


@pytest.mark.root
def test_snapshot_that_another_user_owns_is_a_line_and_a_boot(
    boot: Boot, choices: Choices, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(choices)
    os.chown(folder, SOMEBODY_ELSE, SOMEBODY_ELSE)
    with caplog.at_level(logging.WARNING, "vmkit"):
        assert start_from(boot, monkeypatch, "unused").started_by == "boot"
    (record,) = caplog.records
    assert f"the snapshot's folder {folder} must be yours alone" in record.getMessage()


@pytest.mark.root
@pytest.mark.parametrize("closed", ["snapshots", "snapshots/made"])
def test_store_that_only_another_user_can_open_is_a_line_and_a_boot(
    choices: Choices, folders: Path, closed: str
) -> None:
    """As `sudo vmkit snapshot make` leaves it."""
    folder = make(choices)
    for path in (folders, folders / "cache"):
        path.chmod(0o755)
    (folders / "cache/snapshots/made").chmod(0o755)
    assert ask_as_other(lambda: find_source(SPEC, choices)) != "None", "nothing is closed yet"
    (folders / "cache" / closed).chmod(0o700)

    def find() -> object:
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging.getLogger("vmkit"), "warning", lambda text, *words: lines.append(text % words))
            return find_source(SPEC, choices), lines

    answer = ask_as_other(find)
    assert "cannot look for a snapshot in" in answer and "Permission denied; the machine boots" in answer
    assert str(folder.parent) in answer
    assert ask_as_other(lambda: open_store().read_all()).startswith("HostError: ")


def test_machine_that_is_killed_while_it_is_restored_is_not_booted(
    boot: Boot, choices: Choices, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thaw waits for a guest that this QEMU does not have."""
    folder = make(choices)

    def kill() -> None:
        events = folders / "runtime/machines/tiny/events.jsonl"
        until(lambda: events.exists() and "resume" in events.read_text(), 20.0)
        entry = find_machine(name="tiny")
        assert entry is not None
        stop.kill(entry)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(MachineError, match="'tiny' did not start: stopped by the host"):
        start_from(boot, monkeypatch, "silent")
    thread.join()
    assert folder.exists()
    assert entries(folders) == []


def test_boot_that_is_demanded_touches_no_snapshot(
    boot: Boot, choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(choices)
    assert start_from(boot, monkeypatch, "exit-at-once", boot=True).started_by == "boot"
    assert folder.exists()


# Snapshots with names.


def make_named(choices: Choices, spec: MachineSpec = SPEC, name: str = "mine") -> Path:
    facts = find_facts(spec, choices)
    return make_snapshot(open_store().find_named(name), facts, memory_mib=spec.memory_mib, options=render_options(spec))


def test_snapshot_with_a_name_brings_its_options(choices: Choices, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    saved = replace(SPEC, memory_mib=300, cpus=2, disks=(DiskSpec(tmp_path / "disk"),))
    assert parse_options(json.loads(json.dumps(render_options(saved))))["disks"] == saved.disks
    make_named(choices, saved)
    bare = MachineSpec(snapshot="mine", name="own", accelerator=Accelerator.TCG, backend=Backend.USER)
    taken = take_options(bare)
    assert (taken.memory_mib, taken.cpus, taken.append, taken.disks) == (300, 2, SPEC.append, saved.disks)
    assert (taken.name, taken.snapshot) == ("own", "mine")
    source = find_source(taken, choices)
    assert source is not None and source.is_named
    for other in ({"memory_mib": 128}, {"image": "debian"}, {"append": "x"}):
        with pytest.raises(ConfigError, match="the snapshot 'mine' has another"):
            take_options(replace(bare, **other))
    with pytest.raises(ConfigError, match="--boot excludes --snapshot"):
        take_options(replace(bare, boot=True))
    with pytest.raises(MachineError, match="there is no snapshot 'other'"):
        take_options(replace(bare, snapshot="other"))
    with pytest.raises(ConfigError, match="cannot be a machine's name"):
        take_options(replace(bare, snapshot="../made"))


def test_snapshot_with_a_name_finds_its_recipe_from_everywhere(
    choices: Choices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "here" / "my.toml"
    recipe.parent.mkdir()
    monkeypatch.chdir(recipe.parent)
    make_named(choices, replace(SPEC, image="my.toml"))
    bare = MachineSpec(snapshot="mine")
    for image in ("tiny", "my.toml", "./my.toml", str(recipe)):
        assert take_options(replace(bare, image=image)).image == str(recipe)
    monkeypatch.chdir(tmp_path)
    assert take_options(bare).image == str(recipe)
    with pytest.raises(ConfigError, match="another image"):
        take_options(replace(bare, image="my.toml"))


def test_snapshot_with_a_name_that_does_not_fit_is_refused_and_stays(choices: Choices) -> None:
    folder = make_named(choices)
    qemu = replace(choices.qemu, version=(10, 0, 0))
    newer = replace(choices, built=replace(choices.built, digest="2" * 64), qemu=qemu)
    with pytest.raises(MachineError, match="does not fit any more: the image, QEMU changed since it was saved"):
        find_source(replace(SPEC, snapshot="mine"), newer)
    assert folder.exists()


def test_snapshot_with_a_name_that_fails_is_an_error_and_no_boot(
    boot: Boot, choices: Choices, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_named(choices)
    with pytest.raises(MachineError, match="did not start from its snapshot: QEMU refused the state"):
        start_from(boot, monkeypatch, "refuse-state", snapshot="mine")
    assert folder.exists()
    assert entries(folders) == []
