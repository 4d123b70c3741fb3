"""A path in the place of an image's name: what is a disk, what is a recipe, and what is neither."""

import os
import shutil
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import vmkit
from tests.vmkit.roots.disks import MIB, make_file_system
from vmkit.errors import ConfigError, HostError, VmkitError
from vmkit.image.build import BuiltImage
from vmkit.image.recipe.config import load_image
from vmkit.machine.choose import find_image
from vmkit.machine.parts.disk import DiskPart, check_root
from vmkit.machine.source import NamedRoot, RootDisk, find_source, name_machine, read_root, take_source

MAKERS = {
    "ext4": "mke2fs",
    "squashfs": "mksquashfs",
    "erofs": "mkfs.erofs",
    "xfs": "mkfs.xfs",
    "btrfs": "mkfs.btrfs",
}


def make_root(kind: str, path: Path) -> Path:
    if shutil.which(MAKERS[kind], path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip(f"needs {MAKERS[kind]}")
    return make_file_system(kind, path)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root("ext4", tmp_path_factory.mktemp("disks") / "my root.img")


def partition(path: Path, *parts: Path) -> Path:
    """A disk with an MBR that has these file systems as its partitions, of 4 MiB each, from 1 MiB on."""
    table = b""
    for number in range(len(parts)):
        table += struct.pack("<4xB3xII", 0x83, (1 + 4 * number) * MIB // 512, 4 * MIB // 512)
    with path.open("wb") as file:
        file.write(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
        for number, part in enumerate(parts):
            file.seek((1 + 4 * number) * MIB)
            file.write(part.read_bytes())
        file.truncate((1 + 4 * len(parts)) * MIB)
    return path


def make_built(tmp_path: Path, *, name: str = "any", root: Path | None = None, takes_root: bool = False) -> BuiltImage:
    return BuiltImage(name, tmp_path, tmp_path, tmp_path, (), "root", "0", True, root, takes_root)


@pytest.mark.parametrize("kind", MAKERS)
def test_disk_is_known_by_its_file_system(tmp_path: Path, kind: str) -> None:
    disk = make_root(kind, tmp_path / "disk.img")
    assert (find_source(str(disk)), read_root(disk, None)) == (NamedRoot(str(disk), disk), RootDisk(kind))
    assert RootDisk(kind).render() == kind


def test_partition_is_found_or_chosen(tmp_path: Path, ext4: Path) -> None:
    one = partition(tmp_path / "one.img", ext4)
    assert read_root(one, None).render() == "ext4:1"
    two = partition(tmp_path / "two.img", ext4, ext4)
    assert read_root(two, 2).render() == "ext4:2"
    with pytest.raises(ConfigError, match="has 2 partitions that may be the root") as caught:
        check_root(two)
    assert caught.value.hint == "choose one: --partition N"
    with pytest.raises(ConfigError, match="has no partition 3"):
        check_root(two, 3)
    with pytest.raises(ConfigError, match="has no partitions"):
        check_root(ext4, 1)


def test_partition_is_one_of_a_disk() -> None:
    with pytest.raises(ConfigError, match="--partition needs a disk of yours"):
        vmkit.Machine("debian", partition=1)
    for number in (0, 129):
        with pytest.raises(ConfigError, match=f"must be between 1 and 128, not {number}"):
            vmkit.Machine("any", root="/r", partition=number)


def test_machine_of_a_disk_has_the_image_that_takes_any_root(ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ext4.parent)
    spec = vmkit.Machine("./my root.img").spec
    assert (spec.image, spec.root) == ("any", ext4)
    assert name_machine(ext4) == "my-root"
    assert name_machine(ext4.with_name("-.img")) == "any"
    assert len(name_machine(ext4.with_name("x" * 200))) == 32


def test_name_without_a_slash_and_a_recipe_are_no_disks(
    tmp_path: Path, ext4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "odd.toml"):
        shutil.copy(ext4, name)
    (tmp_path / "recipe").write_text('extends = "tiny"\n')
    for image in ("tiny", "odd.toml", "./odd.toml", "./recipe"):
        assert find_source(image) is None


def test_what_is_neither_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "zero.img").write_bytes(bytes(4096))
    (tmp_path / "small.img").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("zero.img", "vmkit cannot tell what .*zero.img is"),
        ("small.img", "it is smaller than one sector"),
        ("none.img", "there is no root or recipe"),
        ("fifo", "it is neither a file nor a block device"),
    ):
        with pytest.raises(VmkitError, match=words):
            DiskPart().check_host(vmkit.Machine(f"{tmp_path}/{name}").spec)


def test_qcow2_that_names_a_file_of_the_host_is_refused(tmp_path: Path) -> None:
    """QEMU would open it, and the guest would read it."""
    name = b"/etc/shadow"
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 104, len(name), 16, MIB, 0, 1, 65536, 0, 0, 0, 0)
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(header.ljust(104, b"\0") + name + bytes(1 << 17))
    with pytest.raises(ConfigError, match="needs the backing file /etc/shadow, which you have not named"):
        check_root(disk)
    with pytest.raises(HostError, match=r"its name does not end in \.qcow2"):
        check_root(disk.rename(tmp_path / "disk.img"))


def test_folder_and_archive_become_a_disk_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "my folder/etc").mkdir(parents=True)
    (tmp_path / "my folder/etc/hostname").write_text("mine\n")
    with tarfile.open(tmp_path / "web.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "my folder", ".")
    monkeypatch.chdir(tmp_path)
    for words, name in (("./my folder", "my-folder"), ("./web.tar.gz", "web")):
        spec = vmkit.Machine(words).spec
        assert (spec.image, spec.root) == ("any", None)
        assert name_machine(spec.source) == name
        taken = take_source(spec, lambda _text, _fraction: None)
        assert taken.root is not None
        assert taken.root.is_relative_to(tmp_path / "cache")
        assert read_root(taken.root, None) == RootDisk("ext4")


@pytest.mark.parametrize(
    ("words", "name"),
    [("oci:a/layout:stable", "layout-stable"), ("docker://debian:stable", "debian-stable"), ("-", "any")],
)
def test_container_image_is_named_by_a_scheme(words: str, name: str) -> None:
    spec = vmkit.Machine(words).spec
    assert (spec.image, spec.source, name_machine(spec.source)) == ("any", words, name)


def test_word_before_a_colon_is_a_known_scheme() -> None:
    with pytest.raises(ConfigError, match="begins with 'ftp:', which is no kind of root"):
        vmkit.Machine("ftp:thing")


def test_root_is_given_once(ext4: Path) -> None:
    with pytest.raises(ConfigError, match="has a root already"):
        vmkit.Machine(str(ext4), root=ext4)


def test_image_and_root_must_fit(tmp_path: Path, ext4: Path) -> None:
    part, in_partition = DiskPart(), partition(tmp_path / "disk.img", ext4)
    with pytest.raises(ConfigError, match="has no root of its own"):
        part.check_image(vmkit.Machine("any").spec, make_built(tmp_path, takes_root=True))
    with pytest.raises(ConfigError, match="makes a disk of docker://x when it starts the machine"):
        part.check_image(vmkit.Machine("docker://x").spec, make_built(tmp_path, takes_root=True))
    part.check_image(vmkit.Machine("any", root=in_partition).spec, make_built(tmp_path, takes_root=True))
    with pytest.raises(ConfigError, match="needs an ext4 without partitions as its root"):
        part.check_image(vmkit.Machine("debian", root=in_partition).spec, make_built(tmp_path, root=tmp_path))
    part.check_image(vmkit.Machine("debian", root=ext4).spec, make_built(tmp_path, root=tmp_path))


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_image_gets_the_driver_of_its_root(tmp_path: Path, ext4: Path, kind: str) -> None:
    """Only where the root needs it, and where its image takes any root."""
    plain, rare = load_image("any"), make_root(kind, tmp_path / "x.img")
    assert kind not in plain.modules_available
    spec = vmkit.Machine(str(rare)).spec
    assert find_image(spec) == replace(plain, modules_available=(*plain.modules_available, kind))
    assert find_image(vmkit.Machine(str(ext4)).spec) == plain
    # Its modules come from the user's own.
    assert find_image(replace(spec, kernel=Path("/k"))) == find_image(replace(spec, tree=Path("/t"))) == plain
    assert kind not in find_image(replace(spec, image="debian")).modules_available
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'extends = "any"\nmodules_available = ["{kind}"]\n')
    mine = replace(spec, image=str(recipe))
    assert find_image(mine) == load_image(str(recipe))


def test_recipe_says_that_its_root_is_given() -> None:
    spec = load_image("any")
    assert spec.root == "given"
    assert dict(spec.variables)["vshd_flags"] == ("--root_namespace=/etc/vmkit/root",)


def test_root_that_vanishes_is_an_error_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        read_root(tmp_path / "gone", None)
