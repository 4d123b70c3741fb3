"""A path in the place of an image's name: what is a disk, what is a recipe, and what is neither."""

import os
from pathlib import Path

import pytest

import vmkit
from vmkit.errors import ConfigError, HostError, VmkitError
from vmkit.image.build import BuiltImage
from vmkit.image.recipe.config import load_image
from vmkit.machine.parts.disk import DiskPart
from vmkit.machine.source import find_file_system, find_source, name_machine, read_root_type

# As mke2fs, mksquashfs and mkfs.erofs begin theirs.
HEADS = {
    "ext4": bytes(1080) + b"\x53\xef" + bytes(966),
    "squashfs": b"hsqs" + bytes(2044),
    "erofs": bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(1020),
}


def make_disk(path: Path, kind: str = "ext4") -> Path:
    path.write_bytes(HEADS[kind])
    return path


def make_built(tmp_path: Path, *, root: Path | None = None, takes_root: bool = False) -> BuiltImage:
    return BuiltImage("image", tmp_path, tmp_path, tmp_path, (), "root", "0", True, root, takes_root)


@pytest.mark.parametrize("kind", HEADS)
def test_disk_is_known_by_its_file_system(tmp_path: Path, kind: str) -> None:
    disk = make_disk(tmp_path / "disk.img", kind)
    assert find_file_system(HEADS[kind]) == kind
    assert (find_source(str(disk)), read_root_type(disk)) == (disk, kind)
    assert find_file_system(HEADS[kind].rstrip(b"\0")[:-1]) == ""


def test_machine_of_a_disk_has_the_image_that_takes_any_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_disk(tmp_path / "my root.img")
    spec = vmkit.Machine("./my root.img").spec
    assert (spec.image, spec.root) == ("any", tmp_path / "my root.img")
    assert name_machine(tmp_path / "my root.img") == "my-root"
    assert name_machine(tmp_path / "-.img") == "any"
    assert len(name_machine(tmp_path / ("x" * 200))) == 32


def test_name_without_a_slash_and_a_recipe_are_no_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_disk(tmp_path / "tiny")
    make_disk(tmp_path / "odd.toml")
    (tmp_path / "recipe").write_text('extends = "tiny"\n')
    for image in ("tiny", "odd.toml", "./odd.toml", "./recipe"):
        assert find_source(image) is None


def test_what_is_neither_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "zero.img").write_bytes(bytes(4096))
    (tmp_path / "empty.img").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("zero.img", "holds no file system that a guest can have as its root"),
        ("empty.img", "holds no file system that a guest can have as its root"),
        ("none.img", "there is no disk or recipe"),
        ("", "is a directory"),
        ("fifo", "it is neither a file nor a block device"),
    ):
        with pytest.raises(VmkitError, match=words) as caught:
            vmkit.Machine(f"{tmp_path}/{name}")
        assert caught.value.hint or name == "fifo"


def test_root_is_given_once(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a.img")
    with pytest.raises(ConfigError, match="has a root already"):
        vmkit.Machine(str(disk), root=disk)


def test_image_and_root_must_fit(tmp_path: Path) -> None:
    part, squashfs = DiskPart(), make_disk(tmp_path / "a.sqsh", "squashfs")
    with pytest.raises(ConfigError, match="has no root of its own"):
        part.check_image(vmkit.Machine("any").spec, make_built(tmp_path, takes_root=True))
    part.check_image(vmkit.Machine("any", root=squashfs).spec, make_built(tmp_path, takes_root=True))
    with pytest.raises(ConfigError, match="needs an ext4 as its root"):
        part.check_image(vmkit.Machine("debian", root=squashfs).spec, make_built(tmp_path, root=tmp_path))


def test_recipe_says_that_its_root_is_given() -> None:
    spec = load_image("any")
    assert spec.root == "given"
    flags = dict(spec.variables)["vshd_flags"]
    assert flags == ("--root_namespace=/etc/vmkit/root",)


def test_root_that_vanishes_is_an_error_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        read_root_type(tmp_path / "gone")
