"""Debian's kernel packages, laid out as the build trees that they came from."""

import json
from pathlib import Path

from tests.vmkit.trees.trees import add_section
from vmkit.image.build import build_image, fetch_packages
from vmkit.image.cache import Cache, find_cache_dir
from vmkit.image.debian.deb import read_deb
from vmkit.image.formats.packed import unpack_xz
from vmkit.image.formats.tree import FileKind
from vmkit.image.formats.vmlinux import extract_vmlinux
from vmkit.image.recipe.config import load_image

# Only these are there; the list has all.
BUILT = (
    *("vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common", "virtio_blk", "overlay"),
    *("virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"),
    *("9p", "9pnet", "9pnet_virtio", "netfs", "fscache", "fuse", "virtiofs"),
)
LIMIT_BYTES = 64 << 20


def find_package(image: str) -> Path:
    """The package of an image's kernel."""
    spec = load_image(image)
    manifest = json.loads(build_image(spec).manifest.read_bytes())
    fetch_packages(spec, lambda _text, _fraction: None)
    package = next(entry for entry in manifest["packages"] if entry["name"].startswith("linux-image-"))
    return Cache(find_cache_dir()).package_path(package["sha256"])


def lay_out(package: Path, tree: Path) -> Path:
    """The files of a kernel package in the places where a build leaves them. Each module has debug data."""
    order = []
    for path, node in read_deb(package):
        folder, _, name = path.rpartition("/")
        place, data = "", node.data
        if folder == "boot" and name.startswith("vmlinuz-"):
            place, version = "arch/x86/boot/bzImage", name.removeprefix("vmlinuz-")
            for target, content in (("vmlinux", extract_vmlinux(data)), ("include/config/kernel.release", version)):
                (tree / target).parent.mkdir(parents=True, exist_ok=True)
                (tree / target).write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
        elif folder == "boot" and name.startswith("config-"):
            place = ".config"
        elif name == "modules.builtin":
            place = name
        elif ".ko" in name and node.kind is FileKind.FILE:
            inner = path.partition("/kernel/")[2].partition(".ko")[0]
            order.append(f"{inner}.o\n")
            if name.partition(".ko")[0].replace("-", "_") in BUILT:
                plain = unpack_xz(data, LIMIT_BYTES) if name.endswith(".xz") else data
                place = f"{inner}.ko"
                data = add_section(add_section(plain, b".debug_info", bytes(1 << 20)), b".of_the_tree", b"MINE")
        if place:
            (tree / place).parent.mkdir(parents=True, exist_ok=True)
            (tree / place).write_bytes(data)
    (tree / "modules.order").write_text("".join(order))
    return tree
