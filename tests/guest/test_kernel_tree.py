"""A kernel from its build tree, and a folder of the host as the root: Debian's kernels, as if they were built here."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.guest.kernel_tree import find_package, lay_out
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image

# More than QEMU may open.
FILES = 600
OPEN_FILES = 256


@pytest.fixture(scope="module")
def tree(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(find_package("tiny"), tmp_path_factory.mktemp("my linux"))


def test_kernel_and_modules_come_from_the_tree(tree: Path, up: Run, vmkit: Run, vsh: Run) -> None:
    done = up("--tree", str(tree), "--gdb", "--name", "mine")
    assert done.returncode == 0, done.stderr.decode()
    assert f"gdb:      gdb '{tree}/vmlinux' -ex 'target remote " in done.stdout.decode()
    where = ("--vm_name", "mine", "--", "sh", "-c")
    script = "cd /usr/lib/modules/$(uname -r) && cat modules.dep && grep -l MINE $(find . -name 'vsock.ko') && du -sk ."
    told = vsh(*where, script).stdout.decode().splitlines()
    assert any(line.startswith("kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko:") for line in told), told
    assert "./kernel/net/vmw_vsock/vsock.ko" in told
    # A megabyte of debug data of each module stayed on the host.
    assert int(told[-1].split()[0]) < 2048
    assert b"nokaslr" in vsh(*where, "cat /proc/cmdline").stdout
    assert json.loads(vmkit("status", "--json", "mine").stdout)["tree"] == str(tree)


def test_option_that_is_missing_is_named_before_the_boot(tree: Path, up: Run) -> None:
    config = tree / ".config"
    whole = config.read_text()
    try:
        config.write_text(whole.replace("CONFIG_VIRTIO_VSOCKETS=m\n", "# CONFIG_VIRTIO_VSOCKETS is not set\n"))
        done = up("--tree", str(tree))
    finally:
        config.write_text(whole)
    assert done.returncode == 64
    assert b"lacks what the machine needs: CONFIG_VIRTIO_VSOCKETS\n" in done.stderr
    assert b"CONFIG_VIRTIO_VSOCKETS=y\n" in done.stderr


@pytest.fixture(scope="module")
def full_tree(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a kernel which is not for clouds alone: it has 9p, and virtio_pci is a module, unlike in tiny's own."""
    recipe = tmp_path_factory.mktemp("recipe") / "full.toml"
    recipe.write_text('extends = "tiny"\nkernel = "linux-image-amd64"\nkernel_suite = "bookworm"\n')
    return lay_out(find_package(str(recipe)), tmp_path_factory.mktemp("full"))


def test_folder_of_the_host_is_the_root_of_a_tree(full_tree: Path, tmp_path: Path, vsh: Run, up: Run) -> None:
    root = tmp_path / "my, root"
    for place in ("bin", "etc", "many", "run", "tmp"):
        (root / place).mkdir(parents=True)
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    (root / "bin/busybox").write_bytes(next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox"))
    (root / "bin/busybox").chmod(0o755)
    for applet in ("sh", "find", "cat", "wc", "ls", "touch", "rm"):
        (root / "bin" / applet).symlink_to("busybox")
    for number in range(FILES):
        (root / f"many/{number}").write_text("x")
    (root / "run/of-the-host").touch()
    script = 'ulimit -n "$1" && shift && exec "$@"'
    words = ("up", "--accel", "tcg", "--tree", str(full_tree), "--root-from", str(root))
    done = run_script(script, str(OPEN_FILES), str(BIN / "vmkit"), *words)
    assert done.returncode == 0, done.stderr.decode()
    assert f"the root is {root} of this host, read-only, by 9p" in done.stdout.decode()
    where = ("--vm_name", "my-root", "--", "sh", "-c")
    told = vsh(*where, "find / -xdev -type f | wc -l && cat /many/* | wc -c && ls /run && echo of $(ls /bin/sh)").stdout
    assert told.decode().split() == [str(FILES + 1), str(FILES), "of", "/bin/sh"]
    # What the guest changes is its own.
    assert vsh(*where, "rm /many/1 && touch /new && ls /new").stdout == b"/new\n"
    assert (root / "many/1").exists()
    assert not (root / "new").exists()


def run_script(script: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, timeout=DEADLINE_S, check=False)
