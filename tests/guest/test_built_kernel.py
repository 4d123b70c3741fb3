"""A kernel that is built here, from Debian's sources: the smallest one, and the lines that vmkit asks for.

So the lines suffice, and modules of a real tree load. The build takes six minutes on two quiet cores.
"""

import glob
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import vmkit
from vmkit.trees.config import find_missing, find_needs, parse_config

SOURCES = "/usr/src/linux-source-*.tar.xz"
PROGRAMS = ("make", "gcc", "flex", "bison", "bc", "xz")
# What has no default in a kernel that can do nothing: modules, gdb's start, and a clock.
MORE = "CONFIG_MODULES=y\nCONFIG_HYPERVISOR_GUEST=y\nCONFIG_PVH=y\n"
BUILD_TIMEOUT_S = 5400
TREE_VARIABLE = "VMKIT_TEST_KERNEL_TREE"

pytestmark = pytest.mark.slow


def make(tree: Path, *words: str) -> None:
    done = subprocess.run(
        ["make", "-s", *words], cwd=tree, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that is built; $VMKIT_TEST_KERNEL_TREE names one that an earlier run has made."""
    given = os.environ.get(TREE_VARIABLE)
    if given:
        return Path(given)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not Path("/usr/include/gelf.h").exists():
        missing.append("libelf-dev")
    sources = sorted(glob.glob(SOURCES))
    if not sources:
        missing.append("linux-source")
    if missing:
        pytest.skip(f"needs the packages of: {', '.join(missing)} (make slow installs them)")
    folder = tmp_path_factory.mktemp("linux")
    subprocess.run(["tar", "-xf", sources[-1], "-C", folder, "--strip-components=1"], check=True, timeout=600)
    make(folder, "tinyconfig")
    config = folder / ".config"
    needs = (*find_needs(root="ext4", has_disks=True, has_token=True), *find_needs(root="9p"))
    config.write_text(f"{config.read_text()}{MORE}" + "\n".join(find_missing(needs, parse_config(""))) + "\n")
    for name in ("VSOCKETS", "VIRTIO_VSOCKETS", "OVERLAY_FS", "VIRTIO_BLK"):
        config.write_text(config.read_text().replace(f"CONFIG_{name}=y", f"CONFIG_{name}=m"))
    make(folder, "olddefconfig")
    assert find_missing(needs, parse_config(config.read_text())) == []
    make(folder, f"-j{os.cpu_count()}", "bzImage", "modules")
    return folder


def test_smallest_kernel_boots_with_its_modules(tree: Path, folders: Path) -> None:
    release = (tree / "include/config/kernel.release").read_text().strip()
    with vmkit.Machine(tree=tree, accelerator="tcg", backend="user", timeout_s=300) as machine:
        assert machine.run(["uname", "-r"]).stdout.decode().strip() == release
        assert b"vmw_vsock_virtio_transport" in machine.run(["cat", "/proc/modules"]).stdout
        assert machine.run(["id", "-un"], user="user").stdout == b"user\n"
