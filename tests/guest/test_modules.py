"""Every module that an image lists loads, with the kernel of the images and with Debian's own on a disk root."""

from pathlib import Path

import pytest

import vmkit
from vmkit.image.recipe.config import list_images

# What an emulated processor or a machine without the hardware answers: the module itself was found, and linked.
NO_HARDWARE = ("No such device", "Operation not supported", "Not supported")
# Graphics drivers need each other in more than one way; btrfs asks for ciphers by their aliases.
MORE_OF_DEBIAN = ("bochs", "virtio_gpu", "btrfs", "nf_tables", "snd_hda_intel")
LISTED = tuple(dict.fromkeys(name for spec in list_images() for name in (*spec.modules, *spec.modules_available)))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ('extends = "tiny"\n', ()),
        # Its kernel has virtio_blk and ext4 as modules, and ext4 asks for a checksum by name.
        pytest.param('extends = "debian"\nkernel = "linux-image-amd64"\n', MORE_OF_DEBIAN, marks=pytest.mark.slow),
    ],
    ids=["cloud kernel", "stock kernel on a disk"],
)
def test_every_listed_module_loads(folders: Path, tmp_path: Path, recipe: str, more: tuple[str, ...]) -> None:
    names = (*LISTED, *more)
    image = tmp_path / "modules.toml"
    image.write_text(f"{recipe}modules_available = {list(names)}\n")
    script = 'for name; do modprobe "$name" 2>&1 || echo "FAILED $name"; done; dmesg | grep -i "unknown symbol"; true'
    with vmkit.Machine(str(image), accelerator="tcg", backend="user", name="modules", timeout_s=180) as machine:
        told = machine.run(["sh", "-c", script, "sh", *names], timeout=120).stdout.decode()
    trouble = [line for line in told.splitlines() if not line.startswith("FAILED ")]
    assert all(line.endswith(NO_HARDWARE) for line in trouble), told
    # A module without hardware fails, and says so; nothing else fails.
    failed = [line.split()[1] for line in told.splitlines() if line.startswith("FAILED ")]
    assert len(failed) == len(trouble), told
    assert not set(failed) - {"kvm_intel", "kvm_amd"}, told
