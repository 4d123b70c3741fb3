"""A kernel that is built here, from Debian's sources: the smallest one, and the lines that vmkit asks for.

So the lines suffice, modules of a real tree load, and drgn reads the dump of its panic. The build takes six minutes on
two quiet cores.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmkit
from tests.guest.conftest import DEADLINE_S, run_program
from tests.guest.test_crashes import read_crashes
from vmkit.machine.stop import open_control
from vmkit.machine.words import Watch
from vmkit.trees.config import find_missing, find_needs, parse_config

SOURCES = "/usr/src/linux-source-*.tar.xz"
PROGRAMS = ("make", "gcc", "flex", "bison", "bc", "xz")
# What has no default in a kernel that can do nothing: modules, gdb's start, and a clock.
MORE = "CONFIG_MODULES=y\nCONFIG_HYPERVISOR_GUEST=y\nCONFIG_PVH=y\n"
# The dump of a panic that root asks for: its device, the kernel's note in it, and symbols with the lines of the source.
DUMP = """
CONFIG_PVPANIC=y
CONFIG_PVPANIC_PCI=y
CONFIG_FW_CFG_SYSFS=y
CONFIG_PROC_KCORE=y
CONFIG_MAGIC_SYSRQ=y
CONFIG_DEBUG_KERNEL=y
CONFIG_DEBUG_INFO_DWARF_TOOLCHAIN_DEFAULT=y
"""
STACK = """
print("release", prog["init_uts_ns"].name.release.string_().decode())
print(prog.crashed_thread().stack_trace())
"""
DRGN = "drgn==0.3.0"
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
    config.write_text(f"{config.read_text()}{MORE}{DUMP}" + "\n".join(find_missing(needs, parse_config(""))) + "\n")
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


@pytest.fixture
def drgn(tmp_path: Path) -> dict[str, str]:
    """The environment in which its program runs: the wheel of PyPI, for Debian 12's cannot read QEMU's dumps."""
    target = tmp_path / "drgn"
    words = ("install", "--quiet", "--no-deps", "--only-binary=:all:", f"--target={target}", DRGN)
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=600)
    return {**os.environ, "PYTHONPATH": str(target), "PATH": f"{target / 'bin'}:{os.environ['PATH']}"}


def test_drgn_reads_the_dump_of_its_panic(tree: Path, folders: Path, tmp_path: Path, drgn: dict[str, str]) -> None:
    """It runs as `vmkit crashes show` prints it, and finds the function that panicked and its line of the source.

    crash reads no kernel that is as small: it needs modules' symbols, SLUB and SMP.
    """
    with vmkit.Machine(
        tree=tree, accelerator="tcg", backend="user", timeout_s=300, vmcore="elf", name="dumped"
    ) as machine:
        release = machine.run(["uname", "-r"], text=True).stdout.strip()
        with open_control(machine.find_entry()) as control:
            control.ask(Watch())
            with pytest.raises(vmkit.VshError):
                machine.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=DEADLINE_S)
            ended = control.wait_end(DEADLINE_S)
    assert ended is not None
    assert ended.reason == "panic"
    (one,) = read_crashes("dumped")
    assert (one["crash"]["dump"], one["crash"]["trouble"]) == ("elf", "")
    shown = run_program("vmkit", "crashes", "dumped", "show").stdout.decode()
    (line,) = [line for line in shown.splitlines() if line.startswith("drgn:")]
    script = tmp_path / "stack.py"
    script.write_text(STACK)
    done = subprocess.run(
        [*shlex.split(line)[1:], str(script)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=drgn,
    )
    assert f"release {release}\n" in done.stdout, done
    assert re.search(r"sysrq_handle_crash \(drivers/tty/sysrq\.c:\d+", done.stdout), done
    assert run_program("vmkit", "crashes", "dumped", "rm", "1").returncode == 0
