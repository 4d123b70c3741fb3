"""A Debian with systemd as its makers publish it: a disk with a GPT, an ext4 as its root, and an fstab of its own."""

import shutil
import subprocess
from pathlib import Path

from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image

MIB = 1 << 20
ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
EFI_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
# As in Debian's cloud images. Neither of them is there: the root is an overlay, and the second partition has no file
# system.
FSTAB = """
PARTUUID=11111111-2222-3333-4444-555555555555 / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1
PARTUUID=66666666-7777-8888-9999-000000000000 /boot/efi vfat defaults 0 0
"""
RECIPE = """
description = "a Debian with its own init"
kernel = "linux-image-cloud-amd64"
modules = ["virtio_pci", "vsock", "vmw_vsock_virtio_transport"]
root = "disk"
bootstrap = true
packages = {packages}
python_modules = ["json"]
[variables]
hostname = "debian"
path = "/usr/sbin:/usr/bin"
vshd_flags = []
[files]
"/init" = {{ template = "tiny/init.j2", mode = 0o755 }}
"/etc/fstab" = {{ content = '''{fstab}''' }}
"/etc/hostname" = {{ content = "debian\\n" }}
"/run" = {{ directory = true }}
"/tmp" = {{ directory = true, mode = 0o1777 }}
"""
# vmkit's own disks have the first two, and nothing here uses them.
PACKAGES = ("python3", "busybox-static", "systemd-sysv", "udev", "dbus", "procps")


def make_system(folder: Path, *more: str) -> Path:
    """The disk, raw; more: packages. The image's cache keeps the file system, so that it is installed once."""
    name = "system" if not more else f"system-{more[0]}"
    recipe = folder / f"{name}.toml"
    packages = ", ".join(f'"{package}"' for package in (*PACKAGES, *more))
    recipe.write_text(RECIPE.format(packages=f"[{packages}]", fstab=FSTAB))
    built = build_image(load_image(str(recipe)))
    assert built.root is not None
    return add_table(built.root, folder / f"{name}.raw")


def add_table(root: Path, disk: Path) -> Path:
    """A disk whose first partition, by its place, is an empty one, and whose root is the second."""
    size = -(-root.stat().st_size // MIB)
    with disk.open("wb") as file:
        file.truncate((size + 12) * MIB)
    script = f"label: gpt\nstart=1MiB, size=8MiB, type={EFI_TYPE}\nstart=9MiB, size={size}MiB, type={ROOT_TYPE}\n"
    sfdisk = shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin:/bin")
    assert sfdisk is not None, "the package fdisk is missing"
    subprocess.run([sfdisk, "--quiet", disk], input=script.encode(), check=True, capture_output=True)
    with root.open("rb") as source, disk.open("r+b") as target:
        target.seek(9 * MIB)
        shutil.copyfileobj(source, target, MIB)
    return disk
