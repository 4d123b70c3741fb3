"""Guests of other architectures under emulation: sessions, streams, the wall, the token, and a root of one's own."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from tests.guest.test_own_root import APPLETS, make_ext4
from tests.guest.test_wall_layers import EADDRINUSE, attempt
from vmkit.architectures import ARCHITECTURES, Architecture
from vmkit.errors import BuildError
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vmkit.machine.kernel import check_kernel
from vmkit.roots.programs import find_machine

EMULATED = [row for row in ARCHITECTURES.values() if row.is_emulated]
UNAMES = {"arm64": "aarch64", "riscv64": "riscv64", "s390x": "s390x"}
BULK_BYTES = 8_000_000
# Emulation on a busy host: a boot of 4 s has taken 86 s.
BOOT_S = 600
# Without the loopback's module a connect finds no device, or the host's refuses it.
REFUSED = {19, 104, 110}


def write_recipe(folder: Path, base: str, row: Architecture) -> str:
    """A recipe of the base's packages for an architecture. A mirror may lack files that its newest index has."""
    path = folder / f"{base}-{row.name}.toml"
    for more in ("", 'suite = "bookworm"\n'):
        path.write_text(f'extends = "{base}"\n{more}')
        with contextlib.suppress(BuildError):
            build_image(load_image(str(path), row.name))
            break
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("row", EMULATED, ids=lambda row: row.name)
def test_guest_of_another_architecture(row: Architecture, up: Run, vsh: Run, vmkit: Run, tmp_path: Path) -> None:
    if shutil.which(row.qemu) is None:
        pytest.skip(f"{row.qemu} of the package {row.package} is missing")
    # The token is the harder case: it comes in an initramfs of the machine's own.
    done = up(
        *(write_recipe(tmp_path, "tiny", row), "--arch", row.name, "--token", "--name", row.name, "--json"),
        *("--timeout", str(BOOT_S)),
        timeout_s=2 * BOOT_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["architecture"] == row.name
    where = ("--vm_name", row.name)
    assert vsh(*where, "--", "uname", "-m").stdout.decode() == UNAMES[row.name] + "\n"

    data = os.urandom(BULK_BYTES)
    done = vsh(*where, "--", "md5sum", stdin=data)
    assert done.stdout.split()[0].decode() == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert vsh(*where, "--", "cat", stdin=data).stdout == data
    done = vsh(*where, "-t", "--", "sh", "-c", "stty rows 33 cols 77; stty size; exit 5")
    assert (done.returncode, done.stdout.split()) == (5, [b"33", b"77"])
    assert vsh(*where, "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    (tmp_path / "note").write_bytes(data[:100_000])
    assert vmkit("cp", str(tmp_path / "note"), f"{row.name}:/root/").returncode == 0
    assert vmkit("cp", f"{row.name}:/root/note", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == data[:100_000]

    record = json.loads(vmkit("status", row.name, "--json").stdout)
    assert (record["architecture"], record["accelerator"]) == (row.name, "tcg")
    assert record["wall"] == {
        "transport": "on",
        "daemon": "on",
        "kernel": f"missing: vmkit has no program for {row.name}",
    }
    # The layers that are on: there is no loopback, and vshd's port is held before any program of the guest.
    assert set(attempt(vsh, row.name, "stream:1", "stream:3", user="user")) <= REFUSED
    assert attempt(vsh, row.name, "bind:9001", user="user") == [EADDRINUSE]
    assert b"vsock_loopback" not in vsh(*where, "--", "cat", "/proc/modules").stdout
    assert vsh(*where, "--", "stat", "-c", "%a %u", "/etc/vmkit/token").stdout == b"600 0\n"
    assert vsh(*where, "--user=user", "--", "cat", "/etc/vmkit/token").returncode == 1

    assert b"cannot read the kernel's log" in vmkit("dmesg", row.name).stderr
    done = vmkit("down", row.name)
    assert (done.returncode, done.stdout.decode()) == (0, f"{row.name} is down\n")
    assert b"did not power off" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("row", EMULATED, ids=lambda row: row.name)
def test_root_of_another_architecture(row: Architecture, up: Run, vsh: Run, tmp_path: Path) -> None:
    """busybox alone, as a disk. The folder of it is refused on a machine of this host's architecture."""
    if shutil.which(row.qemu) is None:
        pytest.skip(f"{row.qemu} of the package {row.package} is missing")
    image = write_recipe(tmp_path, "any", row)
    built = build_image(load_image(image, row.name))
    check_kernel(built.kernel, row.name)
    busybox = next(entry.node.data for entry in read_cpio(built.initrd.read_bytes()) if entry.path == "usr/bin/busybox")
    assert find_machine(busybox[:20]) == row.name
    folder = tmp_path / "small"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(busybox)
    (folder / "bin/busybox").chmod(0o755)
    for applet in APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    done = up(str(folder))
    assert done.returncode == 64
    assert f"is made for {row.name}, and the machine is amd64: see /bin/sh".encode() in done.stderr
    assert f"--arch {row.name}".encode() in done.stderr
    disk = make_ext4(folder, tmp_path / "small.img")
    done = up(
        *(image, "--root", str(disk), "--arch", row.name, "--name", f"{row.name}-root", "--quiet"),
        *("--timeout", str(BOOT_S)),
        timeout_s=2 * BOOT_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    command = ("sh", "-c", "echo new >/new; cat /new; ls /bin/env")
    assert vsh("--vm_name", f"{row.name}-root", "--", *command).stdout == b"new\n/bin/env\n"
