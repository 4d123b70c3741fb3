"""Debian on a disk, for real: the same bytes twice, dpkg and apt content, and nothing kept of what is written."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmkit
from vmkit.image.build import BuiltImage, build_image
from vmkit.image.cache import find_cache_dir
from vmkit.image.debian.packages import make_request
from vmkit.image.recipe.config import load_image

KERNELS = {"6.1": 'kernel_suite = "bookworm"\n', "6.12": ""}


@pytest.fixture(scope="session")
def debian() -> BuiltImage:
    return build_image(load_image("debian"))


@pytest.fixture(scope="module")
def machine(debian: BuiltImage, folders: Path) -> Iterator[vmkit.Machine]:
    with vmkit.Machine("debian", accelerator="tcg", backend="user", name="debian") as started:
        yield started


def ask(machine: vmkit.Machine, script: str, input: bytes = b"") -> str:
    result = machine.run(["sh", "-c", script], input=input, timeout=120)
    assert result.exit == 0, (script, result.stdout, result.stderr)
    return result.stdout.decode()


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(debian: BuiltImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = find_cache_dir()
    key = make_request(load_image("debian")).key()
    (tmp_path / "resolved").mkdir()
    shutil.copy(cache / "resolved" / f"{key}.json", tmp_path / "resolved")
    (tmp_path / "packages").symlink_to(cache / "packages")
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path))
    again = build_image(load_image("debian"))
    assert (again.cached, again.digest) == (False, debian.digest)
    for name in ("kernel", "initrd", "manifest", "root"):
        assert getattr(again, name).read_bytes() == getattr(debian, name).read_bytes(), name


def test_packages_are_installed_and_not_only_unpacked(machine: vmkit.Machine, debian: BuiltImage) -> None:
    states = ask(machine, "dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\\n'").splitlines()
    assert {line.split()[0] for line in states} == {"installed"}
    assert ask(machine, "dpkg --audit") == ""
    # Nothing of a package is missing or changed, but for documentation and what the recipe puts there itself.
    odd = [line for line in ask(machine, "dpkg --verify || true").splitlines() if "/usr/share/" not in line]
    assert not odd
    ask(machine, "apt-get check && update-alternatives --query pager && su user -c 'id -un' | grep -x user")
    assert debian.manifest.read_text().count('"version"') >= len(states)


def test_package_can_be_installed_in_it(machine: vmkit.Machine, tmp_path: Path) -> None:
    (tmp_path / "p/DEBIAN").mkdir(parents=True)
    (tmp_path / "p/usr/bin").mkdir(parents=True)
    (tmp_path / "p/DEBIAN/control").write_text(
        "Package: greeter\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\n"
        "Depends: libc6\nDescription: x\n"
    )
    (tmp_path / "p/DEBIAN/postinst").write_text("#!/bin/sh\necho set up > /etc/greeter\n")
    (tmp_path / "p/usr/bin/greet").write_text("#!/bin/sh\necho hello\n")
    for path in ("p/DEBIAN/postinst", "p/usr/bin/greet"):
        (tmp_path / path).chmod(0o755)
    deb = tmp_path / "greeter.deb"
    words = ["dpkg-deb", "--root-owner-group", "-b", str(tmp_path / "p"), str(deb)]
    subprocess.run(words, check=True, capture_output=True)
    ask(machine, "cat > /tmp/greeter.deb", deb.read_bytes())
    ask(machine, "apt-get install -y -q /tmp/greeter.deb")
    assert ask(machine, "greet; cat /etc/greeter; dpkg-query -W -f '${db:Status-Status}' greeter") == (
        "hello\nset up\ninstalled"
    )


def test_root_is_an_overlay_and_its_disk_cannot_be_written(machine: vmkit.Machine) -> None:
    mounts = ask(machine, "cat /proc/mounts")
    assert mounts.startswith("overlay / overlay rw,")
    assert ask(machine, "cat /sys/block/vda/ro /sys/block/vda/serial").split() == ["1", "vmkit-root"]
    assert machine.run(["dd", "if=/dev/zero", "of=/dev/vda", "bs=512", "count=1"]).exit != 0
    assert "vsock_loopback" not in ask(machine, "cat /proc/modules")


def test_python_is_compiled_already(machine: vmkit.Machine) -> None:
    """A .pyc is valid for a source of one time and size: a root with other times would compile at every start."""
    script = "import json; print(json.__cached__)"
    told = machine.run(["python3", "-v", "-B", "-c", script]).stderr.decode()
    # What is no .pyc beside its source is this very script and what the interpreter has in itself.
    assert "code object from /usr/lib" not in told, re.findall("code object from /usr/lib.*", told)[:5]


def test_what_a_guest_writes_is_gone_with_it_and_two_share_a_disk(machine: vmkit.Machine, debian: BuiltImage) -> None:
    before = debian.root.stat() if debian.root else None
    ask(machine, "echo mine > /etc/mine; rm /etc/issue")
    with vmkit.Machine("debian", accelerator="tcg", backend="user", name="beside") as beside:
        assert ask(beside, "test ! -e /etc/mine && test -e /etc/issue && echo fresh") == "fresh\n"
    assert debian.root is not None
    assert before is not None
    assert debian.root.stat().st_mtime_ns == before.st_mtime_ns


def test_debian_powers_off_when_asked(debian: BuiltImage, folders: Path) -> None:
    machine = vmkit.Machine("debian", accelerator="tcg", backend="user", name="off")
    with machine:
        machine.down()
    assert not (folders / "state" / "off").exists()


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "my.toml").write_text(text)
        return str(tmp_path / "my.toml")

    return write


@pytest.mark.slow
def test_older_kernel_boots_from_a_disk(folders: Path, recipe: Callable[[str], str]) -> None:
    image = recipe('extends = "debian"\nkernel_suite = "bookworm"\n')
    with vmkit.Machine(image, accelerator="tcg", backend="user", name="older") as machine:
        assert ask(machine, "uname -r").startswith("6.1.")
        assert ask(machine, "cat /proc/mounts").startswith("overlay / ")


def test_tiny_can_have_its_root_on_a_disk(folders: Path, recipe: Callable[[str], str]) -> None:
    with vmkit.Machine(recipe('extends = "tiny"\nroot = "disk"\n'), accelerator="tcg", name="tinydisk") as machine:
        assert ask(machine, "cat /proc/mounts").startswith("overlay / ")
        assert ask(machine, "cat /etc/hostname") == "tinydisk\n"
