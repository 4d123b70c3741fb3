"""Machines that stay: created of a root, started with their options, refused where their disk would be nonsense."""

import os
import shutil
import signal
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import vmkit
from tests.vmkit.machine.conftest import Boot
from tests.vmkit.roots.archives import make_layout, make_tar
from tests.vmkit.roots.disks import make_file_system
from vmkit.errors import ConfigError, MachineError, NameInUseError, VmkitError
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import Started, start_machine
from vmkit.machine.stored import create_stored, hold_stored, make_stored_spec, parse_disk_size
from vmkit.roots.extents import HostFile
from vmkit.roots.superblocks import find_file_system
from vmkit.stored.place import list_names
from vmkit.stored.record import render_record
from vmkit.stored.store import RECORD, lock_stored, read_stored, remove_stored
from vsh.registry import find_machine

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def root(folders: Path) -> Path:
    """A folder that becomes a root."""
    folder = folders / "my root"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/hostname").write_text("mine\n")
    return folder


def test_created_machine_keeps_its_options_and_its_base(root: Path, folders: Path) -> None:
    (folders / "extra.img").write_bytes(bytes(4096))
    stored = create_stored("web", str(root), {"memory": "1G", "disks": [folders / "extra.img"]}, disk_bytes=20 * GIB)
    record = stored.require_record()
    assert (record.root, record.disk_bytes, record.base.path) == ("ext4", 20 * GIB, "base")
    # The cache may go at any time.
    shutil.rmtree(folders / "cache")
    spec = make_stored_spec("web", {"cpus": 2})
    assert (spec.name, spec.image, spec.memory_mib, spec.cpus) == ("web", "any", 1024, 2)
    assert [disk.path for disk in spec.disks] == [folders / "extra.img"]
    assert spec.root == stored.disk
    assert spec.stored is not None
    assert (spec.stored.base, spec.stored.base_format, spec.stored.grows) == (stored.folder / "base", "raw", True)
    assert make_stored_spec("web", {"memory": "512M"}).memory_mib == 512


def test_python_names_a_stored_machine_as_up_does(root: Path) -> None:
    create_stored("web", str(root), {"memory": "1G", "cpus": 2})
    spec = vmkit.Machine("web").spec
    assert (spec.name, spec.memory_mib, spec.cpus) == ("web", 1024, 2)
    assert spec.stored is not None
    # The default in other words is a wish, too.
    spec = vmkit.Machine("web", memory="256M", append="quiet").spec
    assert (spec.memory_mib, spec.cpus, spec.append) == (256, 2, "quiet")
    with pytest.raises(ConfigError, match="--root does not fit 'web'"):
        vmkit.Machine("web", root=str(root))
    assert vmkit.Machine("nothing-of-that-name").spec.image == "nothing-of-that-name"


def test_machine_that_stays_and_is_down_is_named_with_its_start(root: Path) -> None:
    create_stored("web", str(root), {})
    with pytest.raises(MachineError, match="no machine named 'web' is running") as caught:
        vmkit.find_machine("web")
    assert caught.value.hint == "it stays, and is down; start it: vmkit up web"


def test_what_a_container_image_says_is_kept(folders: Path) -> None:
    layer = make_tar([("etc/hostname", b"mine\n")])
    settings = {"Env": ["A=1", "B=2"], "WorkingDir": "srv", "Cmd": ["serve"]}
    layout = make_layout(folders / "layout", [layer], {"config": settings})
    create_stored("web", f"oci:{layout}", {})
    shutil.rmtree(layout)
    container = make_stored_spec("web", {}).container
    assert container is not None
    assert (container.env, container.working_dir, container.cmd) == (("A=1", "B=2"), "/srv", ("serve",))


def test_packed_root_has_a_journal_and_room_to_grow(root: Path) -> None:
    base = create_stored("web", str(root), {}).folder / "base"
    shown = subprocess.run(
        ["dumpe2fs", "-h", base],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"},
    ).stdout
    features = next(line for line in shown.splitlines() if line.startswith("Filesystem features"))
    assert {"has_journal", "resize_inode", "metadata_csum"} <= set(features.split())
    values = dict(line.split(":", 1) for line in shown.splitlines() if ":" in line)
    assert int(values["Free inodes"]) > 4000
    assert int(values["Free blocks"]) * 4096 > 16 * MIB
    # Most of it is holes.
    assert base.stat().st_blocks * 512 < 16 * MIB


def test_disk_of_the_users_is_the_base_where_it_is(folders: Path) -> None:
    disk = make_file_system("ext4", folders / "disk.img")
    stored = create_stored("web", str(disk), {})
    record = stored.require_record()
    assert (record.base.path, record.disk_bytes) == (str(disk), disk.stat().st_size)
    spec = make_stored_spec("web", {})
    assert spec.stored is not None
    assert (spec.stored.base, spec.stored.grows) == (disk, False)
    # One that was written to since is another.
    with disk.open("r+b") as file:
        file.write(b"x")
    os.utime(disk, ns=(0, record.base.mtime_ns + 1))
    with pytest.raises(MachineError, match="the base of 'web' changed since the machine was created"):
        make_stored_spec("web", {})


def test_disk_whose_journal_was_not_replayed_will_do(folders: Path) -> None:
    """The guest replays it, for it may write."""
    disk = make_file_system("ext4", folders / "disk.img")
    with disk.open("r+b") as file:
        file.seek(1024 + 96)
        features = int.from_bytes(file.read(4), "little")
        file.seek(1024 + 96)
        file.write((features | 4).to_bytes(4, "little"))
    with closing(HostFile(disk)) as read:
        found = find_file_system(read.read)
        assert found is not None
        assert found.trouble
    assert create_stored("web", str(disk), {}).require_record().root == "ext4"


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("tiny", "{root}", "'tiny' is the name of an image"),
        ("my.toml", "{root}", "it is the path of a recipe"),
        ("a/b", "{root}", "'a/b' cannot be a machine's name"),
        ("web", "tiny", "'tiny' is an image or a recipe, and a stored machine needs a root of yours"),
        ("web", "{root}/none", "there is no root or recipe"),
        ("web", "{root}/etc/hostname", "is an image or a recipe"),
    ],
)
def test_what_cannot_be_a_machine_is_refused_and_leaves_nothing(
    root: Path, folders: Path, name: str, source: str, words: str
) -> None:
    with pytest.raises(VmkitError, match=words) as caught:
        create_stored(name, source.format(root=root), {})
    assert caught.value.hint or name == "my.toml"
    assert list_names() == []
    assert list((folders / "data").rglob("*.qcow2")) == []


def test_squashfs_is_refused_before_anything_is_made(folders: Path) -> None:
    if shutil.which("mksquashfs") is None:
        pytest.skip("needs mksquashfs")
    disk = make_file_system("squashfs", folders / "disk.img")
    with pytest.raises(ConfigError, match="holds squashfs, and a stored machine needs an ext4"):
        create_stored("web", str(disk), {})
    assert not (folders / "data/machines").exists()


def test_existing_name_is_refused_before_the_root_is_packed(root: Path, folders: Path) -> None:
    create_stored("web", str(root), {})
    shutil.rmtree(folders / "cache/roots")
    with pytest.raises(NameInUseError, match="there is a stored machine 'web' already"):
        create_stored("web", str(root), {})
    assert not (folders / "cache/roots").exists()


def test_sizes_of_disks_are_parsed_and_limited(root: Path) -> None:
    assert [parse_disk_size(text) for text in ("512", "10G", "1t", "512MiB")] == [
        512 * MIB,
        10 * GIB,
        1024 * GIB,
        512 * MIB,
    ]
    with pytest.raises(ConfigError, match="'big' is not a size of a disk"):
        parse_disk_size("big")
    for text in ("0", "5T"):
        with pytest.raises(ConfigError, match=f"--disk-size must be between 1M and 4T, not {text}"):
            parse_disk_size(text)
    with pytest.raises(ConfigError, match=r"--disk-size must be at least \d+M: that is what the root needs"):
        create_stored("web", str(root), {}, disk_bytes=MIB)
    assert list_names() == []


def test_options_that_do_not_fit_are_refused(root: Path) -> None:
    for option in ("name", "root", "snapshot", "gdb"):
        with pytest.raises(ConfigError, match=f"cannot create a stored machine with the option {option}"):
            create_stored("web", str(root), {option: "x"})
    with pytest.raises(ConfigError, match="'lots' is not an amount of memory"):
        create_stored("web", str(root), {"memory": "lots"})
    create_stored("web", str(root), {})
    for option in ("name", "root", "partition", "snapshot"):
        with pytest.raises(ConfigError, match=f"--{option} does not fit 'web', which is a stored machine"):
            make_stored_spec("web", {option: "x"})


def test_machine_without_its_disk_says_so(root: Path) -> None:
    create_stored("web", str(root), {}).disk.unlink()
    with pytest.raises(MachineError, match="the disk of 'web' is missing: ") as caught:
        make_stored_spec("web", {})
    assert "vmkit rm web" in caught.value.hint


def test_machine_that_was_created_again_is_not_started_on_the_old_base(folders: Path) -> None:
    for name in ("a.img", "b.img"):
        make_file_system("ext4", folders / name)
    create_stored("web", str(folders / "a.img"), {})
    spec = make_stored_spec("web", {})
    assert spec.stored is not None
    with hold_stored(spec.stored):
        pass
    remove_stored("web")
    create_stored("web", str(folders / "b.img"), {})
    with (
        pytest.raises(MachineError, match="the machine 'web' was removed and created again") as caught,
        hold_stored(spec.stored),
    ):
        pass
    assert caught.value.hint == "start the new one: vmkit up web"


def test_disk_that_is_too_large_is_refused(folders: Path) -> None:
    disk = make_file_system("ext4", folders / "big.img")
    os.truncate(disk, 5 << 40)
    with pytest.raises(ConfigError, match=r"big.img is larger than the 4T that a stored machine can have"):
        create_stored("big", str(disk), {})
    assert list_names() == []


def test_damaged_disk_is_named_with_its_machine(root: Path) -> None:
    stored = create_stored("web", str(root), {})
    whole = stored.disk.read_bytes()
    for data in (b"", b"x" * 512, whole[:8] + b"\xff" * 100 + whole[108:]):
        stored.disk.write_bytes(data)
        with pytest.raises(MachineError, match=r"the disk of 'web' is damaged: .*/web/disk\.qcow2: ") as caught:
            make_stored_spec("web", {})
        assert "vmkit rm web" in caught.value.hint


def test_disk_of_a_running_machine_is_not_read(root: Path) -> None:
    """Its guest changes it at this moment. `vmkit up --reuse` needs the spec all the same."""
    stored = create_stored("web", str(root), {})
    with lock_stored(stored):
        stored.disk.write_bytes(b"half")
        assert make_stored_spec("web", {}).name == "web"


def test_option_of_a_newer_vmkit_names_the_machine(root: Path) -> None:
    stored = create_stored("web", str(root), {})
    newer = replace(stored.require_record(), options={"turbo": True})
    (stored.folder / RECORD).write_bytes(render_record(newer))
    with pytest.raises(MachineError, match="the machine 'web' was created with the option 'turbo'") as caught:
        make_stored_spec("web", {})
    assert "vmkit rm web" in caught.value.hint


def test_options_that_this_host_cannot_fulfil_are_refused(root: Path, folders: Path) -> None:
    (folders / "one.img").write_bytes(bytes(4096))
    both = {"disks": [folders / "one.img"], "rwdisks": [folders / "one.img"]}
    for options, words in (
        ({"tree": folders / "none"}, "none"),
        ({"disks": [folders / "none.img"]}, "none.img"),
        (both, "two disks are the same file, and the guest can write to it"),
    ):
        with pytest.raises(VmkitError, match=words):
            create_stored("web", str(root), options)
    assert list_names() == []


def start(spec: MachineSpec, image: BuiltImage) -> Started:
    built = replace(image, name="any", takes_root=True)
    spec = replace(spec, append="fake=ready", accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=20.0)
    return start_machine(spec, build=lambda _image, _tell: built)


def test_machine_runs_once_and_can_start_again_after_each_end(
    root: Path, folders: Path, image: BuiltImage, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_stored("web", str(root), {})
    spec = make_stored_spec("web", {})
    started = start(spec, image)
    assert read_stored("web").is_held
    argv = (started.directory / "argv.txt").read_text()
    assert "driver=raw,node-name=base,read-only=on" in argv
    assert "driver=qcow2,node-name=disk0,read-only=off" in argv
    assert "vmkit.stored vmkit.grow" in argv
    with pytest.raises(NameInUseError, match="a machine named 'web' is running"):
        start(spec, image)
    with pytest.raises(MachineError, match="the machine 'web' is running"):
        remove_stored("web")
    # Whoever has another runtime directory does not see it, and does not get it.
    (folders / "other").mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setenv("VMKIT_RUNTIME_DIR", str(folders / "other"))
        with pytest.raises(MachineError, match="the machine 'web' is running"):
            start(spec, image)
        assert find_machine(name="web") is None
    # A crash of the monitor.
    os.kill(started.monitor.pid, signal.SIGKILL)
    started.monitor.wait(10)
    again = start(make_stored_spec("web", {}), image)
    entry = find_machine(name="web")
    assert entry is not None
    stop.kill(entry)
    again.monitor.wait(10)
    remove_stored("web")
    assert list_names() == []
