"""Roots of a user's own, which have nothing of ours: vshd stays beside them, and sessions are in them."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmkit as vmkit_package
from tests.docs.schemas import check_form
from tests.guest.conftest import Run
from tests.vmkit.roots.archives import make_layout
from vmkit.errors import ConfigError
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vsh.address import find_by_name
from vsh.errors import ExecError
from vsh.forward.guest import connect_guest
from vsh.registry import read_machines

APPLETS = ("ash", "cat", "echo", "env", "id", "ls", "mount", "pwd", "readlink", "sh", "sleep", "stty", "tty", "unshare")
MKE2FS = "/usr/sbin/mke2fs"


def make_ext4(folder: Path, disk: Path) -> Path:
    subprocess.run([MKE2FS, "-q", "-t", "ext4", "-d", folder, disk, "32M"], check=True)
    return disk


@pytest.fixture(scope="module")
def busybox(folders: Path) -> bytes:
    """A static program."""
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    return next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox")


@pytest.fixture(scope="module")
def small(busybox: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a system that is busybox alone. Its /tmp is a symlink that leads out of it."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("bin", "etc", "root", "home/ann"):
        (folder / name).mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(busybox)
    (folder / "bin/busybox").chmod(0o755)
    for applet in APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/ash\nann:x:777:777::/home/ann:/bin/ash\n")
    (folder / "etc/group").write_text("wheel:x:778:ann\n")
    (folder / "tmp").symlink_to("/etc/vmkit")
    return folder


def test_system_of_busybox_alone(small: Path, tmp_path: Path, up: Run, vmkit: Run, vsh: Run) -> None:
    disk = make_ext4(small, tmp_path / "my small.img")
    before = disk.read_bytes()
    (tmp_path / "share").mkdir()
    done = up(str(disk), "--quiet", "--share", f"{tmp_path}/share:/share")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"my-small is ready")
    where = ("--vm_name", "my-small")
    done = vsh(*where, "--user", "ann", "--", "sh", "-c", "id; pwd; echo $SHELL; readlink /bin/ls")
    assert done.stdout.decode().splitlines() == [
        *("uid=777(ann) gid=777 groups=777,778(wheel)", "/home/ann", "/bin/ash", "busybox")
    ]
    # All of it is the root's, and nothing but its modules is vshd's.
    names = set(vsh(*where, "--", "ls", "/").stdout.decode().split())
    assert names - {"lost+found"} == {*("bin", "dev", "etc", "home", "proc", "root", "run", "share", "sys", "tmp")}
    # A shared folder is where the sessions are.
    assert vsh(*where, "--", "sh", "-c", "echo x > /share/made; ls /share").stdout == b"made\n"
    assert (tmp_path / "share/made").read_text() == "x\n"
    assert vsh(*where, "--", "sh", "-c", "echo x >/tmp/x && ls /etc /tmp").stdout.split() == [
        *(b"/etc:", b"group", b"passwd", b"/tmp:", b"x")
    ]
    # What a chroot forbids.
    assert vsh(*where, "--", "unshare", "-Ur", "id", "-u").stdout == b"0\n"
    done = vsh(*where, "-t", "--", "sh", "-c", "tty; stty size")
    assert done.stdout.startswith(b"/dev/pts/"), done.stderr
    (tmp_path / "note").write_text("hello")
    assert vmkit("cp", str(tmp_path / "note"), "my-small:/root/").returncode == 0
    assert vmkit("cp", "my-small:/root/note", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_text() == "hello"
    done = vmkit("snapshot", "save", "of-a-root", "--image", str(disk))
    assert done.returncode == 64
    assert b"a snapshot with a name is of an image, and not of a root of yours" in done.stderr
    # There is no poweroff in it.
    done = vmkit("down", "my-small")
    assert (done.returncode, done.stdout) == (0, b"my-small is down\n")
    assert b"did not power off" not in done.stderr
    assert disk.read_bytes() == before


def test_root_of_one_program_and_traps(busybox: bytes, tmp_path: Path, folders: Path, vsh: Run) -> None:
    """No shell, no users. Its names of what is mounted in it are symlinks and files, which lead nowhere."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "busybox").write_bytes(busybox)
    (folder / "busybox").chmod(0o755)
    for name, target in (("dev", "/usr"), ("sys", "/etc"), ("lib", "/usr/lib"), ("run", "run")):
        (folder / name).symlink_to(target)
    (folder / "proc").write_text("a file\n")
    # A program of arm64.
    (folder / "foreign").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(44))
    (folder / "foreign").chmod(0o755)
    with vmkit_package.Machine(str(make_ext4(folder, tmp_path / "one.img")), accelerator="tcg") as machine:
        assert machine.name == "one"
        assert machine.run(["/busybox", "id"], user="12:34").stdout == b"uid=12 gid=34 groups=34\n"
        assert machine.run(["/busybox", "pwd"]).stdout == b"/\n"
        places = machine.run(["/busybox", "awk", "{ print $2 }", "/proc/mounts"]).stdout.split()
        assert set(places) == {b"/", b"/dev", b"/dev/pts", b"/dev/shm", b"/proc", b"/sys"}
        # What cannot run is named, with the remedy.
        done = vsh("--vm_name", "one")
        assert (done.returncode, done.stdout) == (127, b"")
        assert b"vsh: /bin/sh: No such file or directory\nhint: the guest lacks the login shell" in done.stderr
        with pytest.raises(ExecError, match="/foreign: Exec format error"):
            machine.run(["/foreign"])
        # vshd starts again, and still finds the root.
        machine.run(["/busybox", "sh", "-c", "/busybox kill -9 $(/busybox pgrep -P 1)"])
        assert machine.run(["/busybox", "id", "-u"]).stdout == b"0\n"
        machine.down()


def make_packed(kind: str, folder: Path, disk: Path) -> Path:
    """A file system with the files of a folder, by the program of its makers."""
    # The smallest that these two make; a file of the size must be there.
    for name, size in (("xfs", 320 << 20), ("btrfs", 128 << 20)):
        if kind == name:
            disk.write_bytes(b"")
            os.truncate(disk, size)
    prototype = disk.with_suffix(".proto")
    prototype.write_text("\n".join(("/dev/null", "0 0", "d--755 0 0", *list_prototype(folder), "$\n")))
    words: dict[str, list[str | Path]] = {
        "squashfs": ["mksquashfs", folder, disk, "-quiet"],
        "erofs": ["mkfs.erofs", disk, folder],
        "xfs": ["/usr/sbin/mkfs.xfs", "-q", "-p", prototype, disk],
        "btrfs": ["mkfs.btrfs", "-q", "--rootdir", folder, disk],
    }
    subprocess.run(words[kind], check=True, capture_output=True)
    return disk


def list_prototype(folder: Path) -> Iterator[str]:
    """What is in a folder, as mkfs.xfs(8) has it."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            yield f"{path.name} l--777 0 0 {path.readlink()}"
        elif path.is_dir():
            yield f"{path.name} d--755 0 0"
            yield from list_prototype(path)
            yield "$"
        else:
            yield f"{path.name} ---{path.stat().st_mode & 0o777:03o} 0 0 {path}"


@pytest.mark.parametrize("kind", ["squashfs", "erofs", "xfs", "btrfs"])
def test_root_of_other_file_systems(kind: str, small: Path, tmp_path: Path, folders: Path) -> None:
    """Its driver is in the initramfs, whichever it is, and the disk is not written."""
    disk = make_packed(kind, small, tmp_path / "packed.img")
    before = disk.stat().st_mtime_ns
    with vmkit_package.Machine(str(disk), accelerator="tcg") as machine:
        assert (
            machine.run(["sh", "-c", "echo new >/etc/new; cat /etc/new; readlink /bin/ls"]).stdout == b"new\nbusybox\n"
        )
        assert f"vmkit.root={kind}".encode() in machine.run(["cat", "/proc/cmdline"]).stdout
    assert disk.stat().st_mtime_ns == before


# Makes the folder of a system a subvolume, as installers do: by BTRFS_IOC_SUBVOL_CREATE (linux/btrfs.h).
MOVE = """
import fcntl, os, struct, subprocess
subprocess.run("modprobe btrfs && mount -t btrfs /dev/vda /mnt", shell=True, check=True)
folder = os.open("/mnt", os.O_RDONLY)
fcntl.ioctl(folder, 0x5000940E, bytearray(struct.pack("<q4088s", 0, b"@rootfs")))
os.close(folder)
subprocess.run("cd /mnt && mv bin etc home tmp @rootfs/ && cd / && umount /mnt", shell=True, check=True)
"""


@pytest.mark.slow
def test_root_in_a_subvolume(small: Path, tmp_path: Path, folders: Path) -> None:
    """As Debian's installer leaves it: the top of the disk holds no system."""
    disk = make_packed("btrfs", small, tmp_path / "disk.img")
    recipe = tmp_path / "maker.toml"
    recipe.write_text('extends = "tiny"\nmodules_available = ["btrfs"]\n')
    with vmkit_package.Machine(str(recipe), rwdisks=[disk], accelerator="tcg") as machine:
        done = machine.run(["python3", "-c", MOVE])
        assert done.exit == 0, done.stderr
        machine.down()
    with vmkit_package.Machine(str(disk), accelerator="tcg") as machine:
        assert machine.run(["id", "-u"], user="ann").stdout == b"777\n"
        assert machine.run(["sh", "-c", "ls -d /@rootfs"]).exit == 1


def test_root_in_a_partition_of_a_qcow2(small: Path, tmp_path: Path, folders: Path) -> None:
    whole = make_ext4(small, tmp_path / "whole.img").read_bytes()
    # An MBR: one partition of Linux, the second of four, at 1 MiB.
    entry = struct.pack("<4xB3xII", 0x83, 2048, len(whole) // 512)
    table = bytes(446 + 16) + entry + bytes(32) + b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(table.ljust(1 << 20, b"\0") + whole)
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", tmp_path / "disk.raw", disk], check=True)
    before = disk.read_bytes()
    with vmkit_package.Machine(str(disk), partition=2, accelerator="tcg") as machine:
        assert machine.run(["sh", "-c", "echo new >/etc/new; id -u ann"]).stdout == b"777\n"
        assert b"vmkit.root=ext4:2" in machine.run(["cat", "/proc/cmdline"]).stdout
    assert disk.read_bytes() == before


def test_folder_and_archive_become_a_root(small: Path, tmp_path: Path, up: Run, vsh: Run) -> None:
    """As `docker export x | vmkit up -` has it; packed once."""
    folder = tmp_path / "my folder"
    shutil.copytree(small, folder, symlinks=True)
    done = up(str(folder), "--quiet")
    assert done.stdout.startswith(b"my-folder is ready"), done.stderr
    assert vsh("--vm_name", "my-folder", "--", "sh", "-c", "ls /bin/ash; touch /new").stdout == b"/bin/ash\n"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, ".")
    done = up("-", "--quiet", "--name", "piped", stdin=packed.getvalue())
    assert done.stdout.startswith(b"piped is ready"), done.stderr
    assert vsh("--vm_name", "piped", "--user", "ann", "--", "pwd").stdout == b"/home/ann\n"
    assert not (folder / "new").exists()


# The login shell of a root whose C library is musl's.
TOOL = """
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct passwd *user = getpwuid(getuid());
    char *terminal = ttyname(0), *home = getenv("HOME");
    printf("%s %s %s %s\\n", user ? user->pw_name : "?", home ? home : "?", terminal ? terminal : "-", argv[0]);
    return 7;
}
"""


@pytest.mark.slow
def test_root_of_musl(tmp_path: Path, folders: Path, vsh: Run) -> None:
    """Another C library and loader than vshd's, and a program that needs them."""
    assert shutil.which("musl-gcc"), "the package musl-tools is missing: make slow-packages"
    folder = tmp_path / "musl"
    for name in ("bin", "lib", "etc", "home/ann"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "tool.c").write_text(TOOL)
    subprocess.run(["musl-gcc", "-o", folder / "bin/tool", tmp_path / "tool.c"], check=True)
    shutil.copy("/lib/ld-musl-x86_64.so.1", folder / "lib")
    (folder / "etc/passwd").write_text("root:x:0:0::/:/bin/tool\nann:x:777:777::/home/ann:/bin/tool\n")
    with vmkit_package.Machine(str(folder), accelerator="tcg") as machine:
        assert machine.run(["tool"]).stdout == b"root / - tool\n"
        # A login shell, with a terminal.
        done = vsh("--vm_name", "musl", "--user", "ann", "-t")
        assert done.returncode == 7, done.stderr
        words = done.stdout.split()
        assert (words[0], words[1], words[3]) == (b"ann", b"/home/ann", b"-tool")
        assert words[2].startswith(b"/dev/pts/")
        machine.down()


def test_debian_without_python(folders: Path, tmp_path: Path) -> None:
    """Its own shell, users and group database, with libraries of its own."""
    built = build_image(load_image("debian"))
    assert built.root is not None
    with vmkit_package.Machine(str(built.root), name="minbase", accelerator="tcg") as machine:
        done = machine.run(["sh", "-c", "useradd -m ann && su ann -c 'echo $HOME' && dpkg -s bash | grep Status"])
        assert done.stdout.decode().splitlines() == ["/home/ann", "Status: install ok installed"], done.stderr
        assert machine.run(["id", "-un"], user="ann").stdout == b"ann\n"
        # The modules of the kernel that runs are where its own kmod looks.
        assert machine.run(["sh", "-c", "ls /lib/modules/$(uname -r)/modules.dep"]).exit == 0
        listen = "import socket; s = socket.create_server(('127.0.0.1', 4000)); print(1, flush=True)"
        with machine.popen(["python3", "-c", f"{listen}; s.accept()[0].sendall(b'hi')"]) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"1\n"
            fd, early = connect_guest(find_by_name("minbase"), "tcp:localhost:4000", timeout_s=60)
            with socket.socket(fileno=fd) as connection:
                connection.settimeout(60)
                assert early + connection.recv(2 - len(early), socket.MSG_WAITALL) == b"hi"


# systemd as far as vmkit knows it: it takes a signal that was sent before it began, and a unit has failed.
SYSTEMD = """#!/bin/sh
while :; do
    while read -r name value; do [ "$name" != ShdPnd: ] || pending=$value; done < /proc/self/status
    [ "$pending" != 0000002000000000 ] || poweroff -f
    sleep 0.2
done
"""
SYSTEMCTL = """#!/bin/sh
case $1 in
is-system-running) echo degraded; exit 1 ;;
list-units) echo 'broken.service loaded failed failed Broken' ;;
esac
"""


def test_systemd_of_a_root_is_pid_1(small: Path, tmp_path: Path, up: Run, vsh: Run, vmkit: Run) -> None:
    """A stand-in of two scripts; tests/guest/test_systemd_root.py has a Debian."""
    folder = tmp_path / "sys"
    shutil.copytree(small, folder, symlinks=True)
    (folder / "sbin").mkdir()
    (folder / "sbin/init").symlink_to("../lib/systemd/systemd")
    (folder / "lib/systemd").mkdir(parents=True)
    (folder / "bin/poweroff").symlink_to("busybox")
    for path, script in (("lib/systemd/systemd", SYSTEMD), ("bin/systemctl", SYSTEMCTL)):
        (folder / path).write_text(script)
        (folder / path).chmod(0o755)
    (tmp_path / "user data").write_text("#cloud-config\n")
    done = up(str(folder), "--user-data", str(tmp_path / "user data"), "--wait-booted", "--json")
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    check_form("up", answer)
    assert answer["booted"] == {"state": "degraded", "failed": ["broken.service"]}
    assert answer["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
    where = ("--vm_name", "sys")
    assert vsh(*where, "--", "readlink", "/proc/1/exe").stdout == b"/bin/busybox\n"
    assert b"vmkit" not in vsh(*where, "--", "sh", "-c", "env; cat /proc/1/mounts").stdout
    # What cloud-init would do: find the disk, mount it, read it.
    script = "mkdir -p /seed && mount -t iso9660 -o ro /dev/vdb /seed && cat /seed/user-data /seed/meta-data"
    seed = vsh(*where, "--", "sh", "-c", script)
    assert seed.stdout.startswith(b'#cloud-config\n{"instance-id": "sys-'), seed.stderr
    # vshd is nobody's unit, and is started again.
    kill = "read -r _ _ _ pid _ < /proc/$PPID/stat; kill -9 $pid"
    vsh(*where, "--", "sh", "-c", kill)
    assert vsh(*where, "--", "cat", "/proc/self/oom_score_adj").stdout == b"0\n"
    done = vmkit("status", "sys", "--json")
    check_form("machine", json.loads(done.stdout))
    assert json.loads(done.stdout)["init"] == "systemd"
    assert vmkit("wait", "sys", "--booted").stdout == b"sys has booted: degraded, failed units: broken.service\n"
    done = vmkit("down", "sys", "--timeout", "60")
    assert (done.returncode, done.stdout) == (0, b"sys is down\n")
    assert b"did not power off" not in done.stderr
    # A machine that stays gets the data at each boot, as the same instance.
    words = ("--user-data", str(tmp_path / "user data"), "--on-reset=restart")
    done = vmkit("create", "kept", str(folder), *words)
    assert done.returncode == 0, done.stderr.decode()
    assert up("kept").returncode == 0
    where = ("--vm_name", "kept")
    seed = vsh(*where, "--", "sh", "-c", script)
    assert seed.stdout.startswith(b'#cloud-config\n{"instance-id": "kept-'), seed.stderr
    done = vsh(*where, "--", "sh", "-c", "busybox reboot -f; sleep 600")
    assert (done.returncode, b"the guest reboots" in done.stderr) == (123, True), done.stderr
    done = up("kept", "--reuse", "--wait-booted")
    assert b"kept has booted: degraded" in done.stdout, done.stderr
    assert vsh(*where, "--", "sh", "-c", script).stdout == seed.stdout
    assert vmkit("kill", "kept").returncode == 0
    assert vmkit("rm", "kept").returncode == 0
    with vmkit_package.Machine(str(folder), init="none", accelerator="tcg") as machine:
        assert b"vshd.pid1.init" in machine.run(["cat", "/proc/1/cmdline"]).stdout
        assert machine.wait_booted() == vmkit_package.BootState("ready")


def test_image_without_a_root_says_so(folders: Path) -> None:
    with pytest.raises(ConfigError, match="has no root of its own"):
        vmkit_package.Machine("any").start()


@pytest.fixture(scope="module")
def image(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container image of busybox, with all that an image can say."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.add(small, ".", filter=lambda info: info.replace(uid=0, gid=0, deep=False))
    settings = {
        "Env": ["PATH=/bin", "GREETING=hello"],
        "WorkingDir": "/srv/made/later",
        "User": "ann",
        "Entrypoint": ["sh", "-c", 'echo "$GREETING $(id -u) $(pwd) $*"', "entry"],
        "Cmd": ["from", "the image"],
    }
    return make_layout(tmp_path_factory.mktemp("image") / "layout", [layer.getvalue()], {"config": settings})


def test_run_of_a_container_image(image: Path, vmkit: Run, folders: Path, tmp_path: Path) -> None:
    """As docker run --rm: settings, words, streams and statuses of the image and the user; and nothing stays."""
    source = f"oci:{image}"

    def run(*words: str, stdin: bytes = b"") -> tuple[int, bytes]:
        done = vmkit("run", "-q", "--accel", "tcg", *words, stdin=stdin)
        assert not any(machine.record["source"] for machine in read_machines())
        return done.returncode, done.stdout or done.stderr

    assert run(source) == (0, b"hello 777 /srv/made/later from the image\n")
    given = ("-i", "-e", "GREETING=bye", "-w", "/home/ann", "-u", "0:0", "--entrypoint", "sh")
    disk = tmp_path / "out.img"
    disk.write_bytes(bytes(1 << 20))
    line = "echo $GREETING $(id -u) $(pwd); cat; echo kept >/dev/vdb; exit 3"
    done = run(*given, "--rwdisk", str(disk), source, "--", "-c", line, stdin=b"in")
    assert done == (3, b"bye 0 /home/ann\nin")
    # What the guest had in its memory alone.
    assert disk.read_bytes().startswith(b"kept\n")


def test_sessions_have_what_the_image_says(image: Path, vmkit: Run, up: Run, vsh: Run) -> None:
    """As docker exec, in a machine of `up`; and copies are root's."""
    done = up(f"oci:{image}", "--quiet", "--name", "web")
    assert done.returncode == 0, done.stderr.decode()
    where = ("--vm_name", "web")
    done = vsh(*where, "--", "sh", "-c", "echo $GREETING $PATH $HOME; id -u; pwd")
    assert done.stdout.decode().splitlines() == ["hello /bin /home/ann", "777", "/srv/made/later"], done.stderr
    assert vsh(*where, "--user=0:0", "--cwd=/", "--env=HOME=/x", "--", "sh", "-c", "echo $HOME").stdout == b"/x\n"
    assert b"container user" in vmkit("status", "web").stdout
    assert f"oci:{image}".encode() in vmkit("list").stdout
