"""A Debian with systemd as its makers publish it: a disk with a GPT, an ext4 as its root, and an fstab of its own."""

import shutil
import subprocess
from pathlib import Path

from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image

MIB = 1 << 20
ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
EFI_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
ROOT_ID = "11111111-2222-3333-4444-555555555555"
# As in Debian's cloud images. A disk of these tests has neither of them: its root's partition has another id, and the
# other partition has no file system.
FSTAB = f"""
PARTUUID={ROOT_ID} / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1
PARTUUID=66666666-7777-8888-9999-000000000000 /boot/efi vfat defaults 0 0
"""
RECIPE = """
description = "a Debian with its own init"
suite = "{suite}"
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


def make_system(folder: Path, *more: str, suite: str = "auto", room_mib: int = 0) -> Path:
    """The disk, raw; more: packages. The image's cache keeps the file system, so that it is installed once.

    room_mib: so much is free on a disk that its guest is to write to.
    """
    name = "-".join(("system", suite, *more[:1]))
    recipe = folder / f"{name}.toml"
    packages = ", ".join(f'"{package}"' for package in (*PACKAGES, *more))
    recipe.write_text(RECIPE.format(suite=suite, packages=f"[{packages}]", fstab=FSTAB))
    built = build_image(load_image(str(recipe)))
    assert built.root is not None
    if not room_mib:
        return add_table(built.root, folder / f"{name}.raw")
    roomy = folder / f"{name}.ext4"
    shutil.copyfile(built.root, roomy)
    with roomy.open("r+b") as file:
        file.truncate(built.root.stat().st_size + room_mib * MIB)
    # The file system is new, so that it needs no check.
    subprocess.run([find_program("resize2fs", "e2fsprogs"), "-f", roomy], check=True, capture_output=True)
    disk = add_table(roomy, folder / f"{name}-roomy.raw")
    roomy.unlink()
    return disk


def find_program(name: str, package: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    assert found is not None, f"the package {package} is missing"
    return found


def add_table(root: Path, disk: Path) -> Path:
    """A disk whose first partition, by its place, is an empty one, and whose root is the second."""
    size = -(-root.stat().st_size // MIB)
    with disk.open("wb") as file:
        file.truncate((size + 12) * MIB)
    script = f"label: gpt\nstart=1MiB, size=8MiB, type={EFI_TYPE}\nstart=9MiB, size={size}MiB, type={ROOT_TYPE}\n"
    subprocess.run(
        [find_program("sfdisk", "fdisk"), "--quiet", disk], input=script.encode(), check=True, capture_output=True
    )
    with root.open("rb") as source, disk.open("r+b") as target:
        target.seek(9 * MIB)
        shutil.copyfileobj(source, target, MIB)
    return disk
