"""Each check of the doctor where it finds things well, in need of a fallback, and broken."""

import errno
import json
import os
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.errors import HostError
from vmkit.image.build import BuiltImage
from vmkit.machine import doctor, probe
from vmkit.machine.doctor import Check, Level, can_start, examine

Usage = namedtuple("Usage", "total used free")


class Door:
    """/dev/vhost-vsock that opens, or does not."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def open_device(self) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return os.open("/dev/null", os.O_RDWR)

    def set_guest_cid(self, fd: int, cid: int) -> None:
        raise AssertionError("a doctor claims nothing")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with everything `up` needs, all of it fake."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("apt-get", "dpkg-deb", "zstd"):
        make_program(folder, name, "true")
    make_qemu(folder)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def make_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def make_qemu(folder: Path, version: str = "9.0.0", device: str = "vhost-user-vsock-pci", kvm: str = "exit 1") -> None:
    make_program(
        folder,
        probe.QEMU,
        f'case "$*" in --version) echo "QEMU emulator version {version}";;\n'
        f"*help) echo 'name \"{device}\", bus PCI';;\n*) {kvm};; esac",
    )


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch, folders: Path) -> Iterator[list[BuiltImage | None]]:
    """What the image room says of `tiny`: put a BuiltImage in and it is built."""
    state: list[BuiltImage | None] = [None]
    monkeypatch.setattr(doctor, "find_built_image", lambda _spec: state[0])
    yield state


def built(folder: Path) -> BuiltImage:
    kernel = folder / "kernel"
    kernel.write_bytes(b"")
    return BuiltImage("tiny", kernel, kernel, kernel, (), "root", "0" * 64, True)


def find(name: str, door: Door | None = None) -> Check:
    return next(check for check in examine(door=door or Door(errno.ENOENT)) if check.name == name)


@pytest.mark.parametrize(
    ("manifest", "level", "text"),
    [
        (
            {"transport": True, "daemon": True, "kernel": "on", "kernel_trouble": ""},
            Level.OK,
            "transport, daemon, kernel",
        ),
        ({"transport": False, "daemon": False, "kernel": "off", "kernel_trouble": ""}, Level.OK, "layers: none"),
        ({"transport": True, "daemon": True, "kernel": "on", "kernel_trouble": "no BTF"}, Level.FALLBACK, "no BTF"),
        (None, Level.FALLBACK, "does not tell"),
    ],
)
def test_wall_of_the_image_is_told(
    tools: Path, image: list[BuiltImage | None], tmp_path: Path, manifest: object, level: Level, text: str
) -> None:
    image[0] = built(tmp_path)
    (tmp_path / "kernel").write_text(json.dumps({"wall": manifest}))
    check = find("wall of tiny")
    assert check.level is level
    assert text in check.text


def test_host_that_has_everything_can_start(tools: Path, image: list[BuiltImage | None]) -> None:
    checks = examine(door=Door(errno.ENOENT))
    assert [check for check in checks if check.level is Level.BROKEN and check.name != "keyring"] == []
    assert can_start([check for check in checks if check.name != "keyring"])


def test_one_broken_need_is_enough(tools: Path, image: list[BuiltImage | None]) -> None:
    assert not can_start([Check("a", Level.OK, ""), Check("b", Level.BROKEN, "")])
    assert can_start([Check("a", Level.OK, ""), Check("b", Level.FALLBACK, "")])


def test_every_check_is_named_once_and_has_words(tools: Path, image: list[BuiltImage | None]) -> None:
    checks = examine(door=Door(errno.ENOENT))
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert all(check.text for check in checks)


def test_qemu_is_told_with_its_version(tools: Path, image: list[BuiltImage | None]) -> None:
    assert find("qemu") == Check("qemu", Level.OK, f"{tools / probe.QEMU}, version 9.0.0")


def test_old_qemu_is_broken(tools: Path, image: list[BuiltImage | None]) -> None:
    make_qemu(tools, version="5.2.0")
    check = find("qemu")
    assert (check.level, check.text, check.hint) == (Level.BROKEN, "QEMU 5.2.0 is too old", "vmkit needs 6.0 or later")


def test_qemu_without_our_device_is_broken(tools: Path, image: list[BuiltImage | None]) -> None:
    make_qemu(tools, device="virtio-net-pci")
    assert find("qemu").level is Level.OK
    assert find("qemu devices").level is Level.BROKEN


def test_missing_qemu_is_broken_and_the_other_checks_go_on(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    checks = examine(door=Door(errno.ENOENT))
    broken = {check.name: check for check in checks if check.level is Level.BROKEN}
    assert {"qemu", "apt-get", "dpkg-deb", "zstd"} <= set(broken)
    assert "apt-get install qemu-system-x86" in broken["qemu"].hint
    assert checks[-1].name == "image tiny"


def test_missing_kvm_is_a_fallback(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", str(tmp_path / "nothing"))
    check = find("kvm")
    assert check.level is Level.FALLBACK
    assert check.text == f"this host has no {tmp_path / 'nothing'}: TCG will be used, some ten times slower"


def test_kvm_that_cannot_be_opened_comes_with_the_way_to_open_it(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", str(tmp_path))
    check = find("kvm")
    assert (check.level, check.hint) == (Level.FALLBACK, "join the group kvm")
    assert check.text.startswith(f"cannot open {tmp_path}: Is a directory")


def test_kvm_is_not_proven_before_there_is_a_kernel(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", "/dev/null")
    check = find("kvm")
    assert (check.level, "tests whether it works" in check.text) == (Level.OK, True)


@pytest.mark.parametrize(
    ("script", "level", "said"),
    [
        ("echo 'Kernel panic - not syncing: no root'", Level.OK, "/dev/null works: a kernel booted under it"),
        ("echo 'KVM internal error' >&2", Level.FALLBACK, "kernels die under it (KVM internal error): TCG"),
    ],
)
def test_kvm_is_proven_with_the_built_kernel(
    tools: Path,
    image: list[BuiltImage | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    script: str,
    level: Level,
    said: str,
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", "/dev/null")
    image[0] = built(tmp_path)
    make_qemu(tools, kvm=script)
    check = find("kvm")
    assert check.level is level
    assert said in check.text
    if level is Level.FALLBACK:
        assert "to test it again: rm " in check.hint
        assert Path(check.hint.rpartition(" ")[2]).is_file()


def test_vhost_is_used_or_replaced(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "VSH_AF_VSOCK=deny" in find("vhost-vsock").text
    monkeypatch.delenv("VSH_AF_VSOCK")
    assert find("vhost-vsock", Door()).level is Level.OK
    check = find("vhost-vsock", Door(errno.EACCES))
    assert check.level is Level.FALLBACK
    assert check.text == "/dev/vhost-vsock: Permission denied: vmkit's own device will be used (backend user)"


def test_sockets_of_vsock_are_told_without_opening_one(tools: Path, image: list[BuiltImage | None]) -> None:
    check = find("af_vsock")
    assert (check.level, check.text) == (
        Level.FALLBACK,
        "VSH_AF_VSOCK=deny: vsh reaches machines of the user backend only",
    )


@pytest.mark.parametrize(("available_mib", "level"), [(4096, Level.OK), (100, Level.BROKEN)])
def test_memory_is_enough_or_not(
    tools: Path,
    image: list[BuiltImage | None],
    monkeypatch: pytest.MonkeyPatch,
    available_mib: int,
    level: Level,
) -> None:
    monkeypatch.setattr(probe, "read_available_memory_mib", lambda: available_mib)
    check = find("memory")
    assert check.level is level
    assert check.text == f"{available_mib} MiB available, a machine takes 256 by default"


@pytest.mark.parametrize(("free_mib", "level"), [(10_000, Level.OK), (10, Level.BROKEN)])
def test_disk_is_enough_or_not(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, free_mib: int, level: Level
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(0, 0, free_mib << 20))
    check = find("disk")
    assert check.level is level
    assert ("VMKIT_CACHE_DIR" in check.hint) is (level is Level.BROKEN)


def test_disk_of_a_cache_that_is_not_there_yet_is_its_parents(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert find("disk").text.endswith(str(tmp_path / "a" / "b"))


def test_runtime_directory_that_is_refused_is_broken(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find("runtime directory").level is Level.OK
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "open"))
    check = find("runtime directory")
    assert check.level is Level.BROKEN
    assert check.hint == f"chmod 700 {tmp_path / 'open'}"


def test_what_only_a_build_needs_is_no_need_of_a_built_image(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_keyring() -> Path:
        raise HostError("no keyring", hint="get one")

    monkeypatch.setattr(doctor, "find_keyring", no_keyring)
    monkeypatch.setattr("shutil.which", lambda name: None)
    wanted = ("keyring", "zstd", "apt-get")
    assert [find(name).level for name in wanted] == [Level.BROKEN] * 3
    assert find("keyring").hint == "get one"
    image[0] = built(tmp_path)
    assert [find(name).level for name in wanted] == [Level.FALLBACK] * 3


def test_image_is_built_or_will_be(tools: Path, image: list[BuiltImage | None], tmp_path: Path) -> None:
    assert "not built yet" in find("image tiny").text
    image[0] = built(tmp_path)
    assert "ready to start" in find("image tiny").text


def test_check_that_the_host_refuses_is_a_finding(
    tools: Path, image: list[BuiltImage | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache")

    monkeypatch.setattr("shutil.disk_usage", refuse)
    check = find("disk")
    assert (check.level, check.text) == (Level.BROKEN, "/cache: Permission denied")
