"""Machines that stay: what their guests wrote is there at the next start, whatever ended them."""

import json
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vmkit.machine.machine import Machine

MIB = 1 << 20


@pytest.fixture(scope="module")
def root(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system of busybox alone."""
    folder = tmp_path_factory.mktemp("roots") / "small"
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    for name in ("bin", "etc", "root"):
        (folder / name).mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox"))
    (folder / "bin/busybox").chmod(0o755)
    for applet in ("cat", "dd", "df", "echo", "ls", "reboot", "sh", "sleep", "touch"):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    return folder


def test_written_files_outlive_the_machine(root: Path, vmkit: Run, vsh: Run) -> None:
    def sh(script: str) -> str:
        done = vsh("--vm_name", "web", "--", "sh", "-c", script)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def start(*options: str) -> None:
        done = vmkit("up", "web", "--quiet", *options)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.startswith(b"web is ready")

    done = vmkit("create", "web", str(root), "--disk-size", "3G", "--accel", "tcg", "--memory", "200M")
    assert done.returncode == 0, done.stderr.decode()
    # The block ends with the guest's power-off: all is on the disk.
    with Machine("web") as machine:
        assert machine.name == "web"
        machine.run(["sh", "-c", "echo python >/root/python"], check=True)
    start()
    assert sh("cat /root/python") == "python\n"
    # The guest has made its file system as large as its disk.
    blocks = int(sh("df -k /").split()[-5])
    assert blocks * 1024 > 2900 * MIB
    sh("echo first >/root/first; mkdir /srv && echo deep >/srv/deep; echo gone >/run/gone; echo here >/tmp/here")
    assert vmkit("up", "web").returncode == 1
    assert b"'web' is running" in vmkit("rm", "web").stderr
    assert vmkit("down", "web").stdout == b"web is down\n"
    assert b"web" in vmkit("list", "--all").stdout
    start()
    assert sh("cat /root/first /srv/deep /tmp/here; ls /run").split() == ["first", "deep", "here"]
    # A crash: what was synced is there, and the file system is whole.
    sh("echo second | dd of=/root/second conv=fsync 2>/dev/null; echo third >/root/third")
    assert vmkit("kill", "web").returncode == 0
    start("--on-reset=restart")
    assert sh("cat /root/first /root/second").split() == ["first", "second"]
    # A reboot is no end: the same machine is ready again, with its disk.
    done = vsh("--vm_name", "web", "--", "sh", "-c", "echo fifth >/root/fifth; reboot; sleep 600")
    assert done.returncode == 123
    assert b"the guest reboots" in done.stderr
    done = vmkit("up", "web", "--reuse", "--json")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(vmkit("status", "web", "--json").stdout)["reboots"] == 1
    assert sh("cat /root/fifth").split() == ["fifth"]
    assert sh("touch /root/fourth; dd if=/dev/zero of=/srv/large bs=1M count=64 2>/dev/null; ls /srv").split() == [
        *("deep", "large")
    ]
    assert vmkit("down", "web").returncode == 0
    assert vmkit("rm", "web").stdout == b"web is removed\n"
    assert vmkit("up", "web").returncode == 64
