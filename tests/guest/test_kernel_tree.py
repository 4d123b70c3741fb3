"""A kernel from its build tree, and a folder of the host as the root: Debian's kernels, as if they were built here."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

import vmkit
from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.guest.debian_virtiofsd import lay_out_virtiofsd
from tests.guest.kernel_tree import find_package, lay_out
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vmkit.machine import virtiofsd
from vmkit.machine.spec import DEFAULT_MEMORY_MIB
from vmkit.machine.virtiofsd import find_virtiofsd
from vsh.registry import read_machines

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


def make_root(root: Path) -> Path:
    """A folder of the host with busybox and many files."""
    for place in ("bin", "etc", "many", "run", "tmp"):
        (root / place).mkdir(parents=True)
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    (root / "bin/busybox").write_bytes(next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox"))
    (root / "bin/busybox").chmod(0o755)
    for applet in ("sh", "find", "cat", "wc", "ls", "touch", "rm", "mkdir", "mount"):
        (root / "bin" / applet).symlink_to("busybox")
    for number in range(FILES):
        (root / f"many/{number}").write_text("x")
    (root / "run/of-the-host").touch()
    return root


def test_folder_of_the_host_is_the_root_of_a_tree(full_tree: Path, tmp_path: Path, vsh: Run, up: Run) -> None:
    """virtiofsd would keep each file open, so it does not serve under such a limit."""
    root = make_root(tmp_path / "my, root")
    script = 'ulimit -n "$1" && shift && exec "$@"'
    words = ("up", "--accel", "tcg", "--tree", str(full_tree), "--root-from", str(root))
    done = run_script(script, str(OPEN_FILES), str(BIN / "vmkit"), *words)
    assert done.returncode == 0, done.stderr.decode()
    assert f"the root is {root} of this host, read-only, by 9p" in done.stdout.decode()
    assert b"  no virtiofs: " in done.stdout
    where = ("--vm_name", "my-root", "--", "sh", "-c")
    told = vsh(*where, "find / -xdev -type f | wc -l && cat /many/* | wc -c && ls /run && echo of $(ls /bin/sh)").stdout
    assert told.decode().split() == [str(FILES + 1), str(FILES), "of", "/bin/sh"]
    # What the guest changes is its own.
    assert vsh(*where, "rm /many/1 && touch /new && ls /new").stdout == b"/new\n"
    assert (root / "many/1").exists()
    assert not (root / "new").exists()


def test_virtiofsd_serves_a_folder_that_it_can_keep_open(
    full_tree: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, vsh: Run, vmkit: Run
) -> None:
    """The guest cannot write the folder, not even by a mount of its own. Without virtiofsd there is no machine."""
    path = f"{lay_out_virtiofsd(tmp_path_factory.mktemp('virtiofsd'))}:{os.environ['PATH']}"
    root = make_root(tmp_path / "my, root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        found = find_virtiofsd(root, DEFAULT_MEMORY_MIB)
    if "namespaces" in found.trouble:
        pytest.skip(found.trouble)
    words = ("up", "--accel", "tcg", "--tree", str(full_tree), "--root-from", str(root), "--name", "by-virtiofs")
    done = vmkit(*words, env={"PATH": path})
    assert done.returncode == 0, done.stderr.decode()
    assert f"the root is {root} of this host, read-only, by virtiofs\n" in done.stdout.decode()
    where = ("--vm_name", "by-virtiofs", "--", "sh", "-c")
    told = vsh(*where, "find / -xdev -type f | wc -l && cat /many/* | wc -c && ls /run && echo of $(ls /bin/sh)").stdout
    assert told.decode().split() == [str(FILES + 1), str(FILES), "of", "/bin/sh"]
    assert vsh(*where, "rm /many/1 && touch /new && ls /new").stdout == b"/new\n"
    again = vsh(*where, "mkdir /again && mount -t virtiofs -o rw vmkit-root /again && ls /again/run; touch /again/new")
    assert again.stdout == b"of-the-host\n"
    assert again.returncode != 0, again.stderr
    assert (root / "many/1").exists()
    assert not (root / "new").exists()
    (entry,) = (machine for machine in read_machines() if machine.name == "by-virtiofs")
    events = [json.loads(line) for line in (Path(entry.directory) / "events.jsonl").read_text().splitlines()]
    os.kill(next(event["pid"] for event in events if event["event"] == "virtiofsd-started"), signal.SIGKILL)
    done = vmkit("wait", "by-virtiofs")
    assert (done.returncode, b"virtiofsd ended with signal 9" in done.stdout + done.stderr) == (1, True), done


def test_host_itself_is_the_root_by_virtiofs(
    full_tree: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is mounted below / is there, but for what is of this host's processes. Nothing can be written."""
    programs = lay_out_virtiofsd(tmp_path_factory.mktemp("virtiofsd"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    # This guest looks at few files. The host's limit may not suffice for all that it could remember.
    monkeypatch.setattr(virtiofsd, "FILES_PER_MIB", 1)
    found = find_virtiofsd(Path("/"), DEFAULT_MEMORY_MIB)
    if "namespaces" in found.trouble:
        pytest.skip(found.trouble)
    host = sorted(os.listdir("/"))
    with vmkit.Machine(tree=full_tree, root_from="/", accelerator="tcg", boot=True) as machine:
        assert machine.started.choices.root_type == "virtiofs"

        def ask(script: str) -> str:
            return machine.run(["sh", "-c", script], text=True, check=True).stdout

        assert set(host) <= set(ask("ls -A /").splitlines())
        assert ask("cat /etc/os-release") == Path("/etc/os-release").read_text()
        # find(1) takes two folders with one number for a loop: those at which file systems are mounted, for example.
        done = machine.run(["sh", "-c", "find / -xdev -maxdepth 3 | wc -l"], text=True)
        assert int(done.stdout) > 100
        assert "loop" not in done.stderr
        # The guest's own changes are in its memory, and those to the export fail.
        assert ask("echo x > /etc/of-the-guest; cat /etc/of-the-guest; rm /etc/os-release") == "x\n"
        ask("mkdir /run/again && mount -t virtiofs -o rw vmkit-root /run/again")
        for script in (
            *("touch /run/again/etc/new", "rm /run/again/etc/os-release", "chmod 700 /run/again/etc"),
            *("echo x >> /run/again/etc/os-release", "mkdir /run/again/tmp/new", "ln -s a /run/again/etc/new"),
        ):
            done = machine.run(["sh", "-c", script], text=True)
            assert done.exit != 0, script
            assert "Read-only file system" in done.stderr, done
        # The host's own processes and sockets are not in reach either.
        assert ask("cd /run/again && ls -A dev proc run sys tmp | grep -v :") == "\n" * 4
    assert not [name for name in ("of-the-guest", "new") if Path("/etc", name).exists()]
    assert Path("/etc/os-release").exists()


def run_script(script: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, timeout=DEADLINE_S, check=False)
