"""Containers in a real guest: made of a root of this host, entered by vsh, with crun's limits, and gone at the end."""

import gzip
import io
import json
import os
import pty
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmkit
from tests.descriptors import nothing_left_open
from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.vmkit.roots.archives import make_layout
from tests.vmkit.roots.disks import run
from tests.vsh.live import wait_until
from vmkit.errors import MachineError
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vsh.errors import ConnectionLost, VshError

# Building its image takes most of a minute.
pytestmark = pytest.mark.slow

APPLETS = (
    "cat",
    "echo",
    "env",
    "grep",
    "httpd",
    "id",
    "kill",
    "ls",
    "mount",
    "pwd",
    "sh",
    "sleep",
    "stty",
    "touch",
    "tty",
)
SETTINGS = {"Env": ["PATH=/bin", "PLACE=image"], "User": "ann", "WorkingDir": "/srv", "Cmd": ["sh"]}
STORE = "/run/vmkit/containers"


@pytest.fixture(scope="module")
def root_tar(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A root of busybox alone."""
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "etc", "srv", "tmp"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "bin/busybox").write_bytes(next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox"))
    (root / "bin/busybox").chmod(0o755)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    # A program of another processor.
    (root / "srv/foreign").write_bytes(b"\x7fELF\x01\x02\x01" + bytes(57))
    (root / "srv/foreign").chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:777:777::/srv:/bin/sh\n")
    (root / "etc/group").write_text("ann:x:777:\nwheel:x:778:ann\n")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.add(root, ".")
    return data.getvalue()


@pytest.fixture(scope="module")
def layout(root_tar: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container image of it, in an OCI layout."""
    return make_layout(tmp_path_factory.mktemp("image") / "layout", [root_tar], {"config": SETTINGS})


@pytest.fixture(scope="module")
def machine(folders: Path) -> Iterator[vmkit.Machine]:
    with vmkit.Machine("containers", accelerator="tcg", backend="user", name="ship", memory=768) as started:
        yield started


@pytest.fixture(scope="module")
def box(machine: vmkit.Machine, layout: Path) -> Iterator[vmkit.Containers]:
    """The machine's containers; `box` runs."""
    containers = vmkit.Containers(machine)
    containers.create("box", f"oci:{layout}")
    containers.start("box")
    yield containers
    containers.remove("box", force=True)


@pytest.fixture
def enter(box: vmkit.Containers, vsh: Run) -> Run:
    """enter("id") runs a command in the container by the real vsh."""

    def run(*words: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
        return vsh("--vm_name=ship", "--target_container=box", *words, **options)  # type: ignore[arg-type]  # the words of Run

    return run


def test_command_has_what_the_image_says(enter: Run) -> None:
    done = enter("--", "sh", "-c", 'id; pwd; echo "$PLACE $HOME"; cat; exit 7', stdin=b"from here\n")
    assert done.stdout.decode().splitlines() == [
        "uid=777(ann) gid=777(ann) groups=777(ann),778(wheel)", "/srv", "image /srv", "from here"
    ]  # fmt: skip
    assert (done.returncode, done.stderr) == (7, b"")
    words = ("--user=root", "--cwd=/tmp", "--env=PLACE=asked")
    done = enter(*words, "--", "sh", "-c", 'id -u; pwd; echo "$PLACE"; echo err >&2')
    assert (done.stdout, done.stderr) == (b"0\n/tmp\nasked\n", b"err\n")


def test_command_has_the_containers_limits(enter: Run, machine: vmkit.Machine) -> None:
    script = "grep -E '^(CapEff|Seccomp):' /proc/self/status; mount -t tmpfs none /tmp; echo $?; cat /proc/1/cmdline"
    done = enter("--user=root", "--", "sh", "-c", script)
    said = done.stdout.decode().split()
    # The guest's root has all capabilities and no filter.
    assert said[1] != machine.run(["sh", "-c", "grep CapEff /proc/self/status"], text=True).stdout.split()[1]
    assert said[3] == "2"
    assert said[4] != "0"
    # Its processes are its own: pid 1 is the one that waits.
    assert "busybox" in said[5]
    assert not machine.exists("/proc/1/root/dev/.vmkit/busybox")


def test_signal_and_missing_program_end_as_outside(enter: Run, box: vmkit.Containers) -> None:
    assert enter("--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    missing = enter("--", "no-such-program")
    assert (missing.returncode, missing.stdout, missing.stderr.count(b"\n")) == (127, b"", 1), missing.stderr
    assert b"no-such-program" in missing.stderr
    # At a terminal as well, whose output has the reason.
    missing = enter("-t", "--", "no-such-program")
    assert (missing.returncode, missing.stdout.count(b"no-such-program"), missing.stderr) == (127, 1, b""), missing
    # crun 1.21 keeps no log of what the kernel says to a file that is executable.
    for name, status in (("/etc/passwd", 126), ("/etc", 126), ("/srv/foreign", 1)):
        refused = enter("--", name)
        assert (refused.returncode, refused.stdout) == (status, b""), (name, refused.stderr)
        assert refused.stderr.count(b"\n") == 1
    with box.connect("box").popen(["sh", "-c", "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.1; done"],
                                  stdout=vmkit.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "caught\n"
        assert process.wait(DEADLINE_S) == 3


def test_process_does_not_outlive_its_session(box: vmkit.Containers, machine: vmkit.Machine) -> None:
    command = ["sh", "-c", "trap '' HUP TERM; echo up; sleep 3141"]
    with box.connect("box").open_session(command):
        wait_until(lambda: machine.run(["pgrep", "-f", "sleep 3141"]).exit == 0, "the command runs", DEADLINE_S)
    wait_until(lambda: machine.run(["pgrep", "-f", "^sleep 3141"]).exit == 1, "the command is gone", DEADLINE_S)


def test_shell_has_a_terminal_of_the_container(box: vmkit.Containers) -> None:
    ours, theirs = pty.openpty()
    argv = [str(BIN / "vsh"), "--vm_name=ship", "--target_container=box", "-t"]
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs) as shell:
        os.close(theirs)
        os.write(ours, b"stty rows 33; tty; stty size; echo end=$?; exit 5\n")
        said = b""
        while b"end=0" not in said:
            said += os.read(ours, 4096)
        assert b"/dev/pts/0" in said
        assert b"33 " in said
        assert shell.wait(DEADLINE_S) == 5
    os.close(ours)


def test_port_of_a_container_is_the_guests(box: vmkit.Containers, machine: vmkit.Machine) -> None:
    script = "echo from the container > /tmp/page; exec httpd -f -p 127.0.0.1:8123 -h /tmp"
    with box.connect("box").popen(["sh", "-c", script], user="root") as server:
        fetch = "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1:8123/page\").read())'"
        wait_until(lambda: machine.run(["sh", "-c", fetch]).exit == 0, "the port is the guest's", DEADLINE_S)
        # This is where `vmkit forward --auto` finds it.
        assert b":1FBB" in machine.run(["cat", "/proc/net/tcp"]).stdout
        server.kill()


def test_program_of_a_container_does_not_reach_the_vsock(enter: Run) -> None:
    # busybox has no vsock: what the filter says of the system call is in the kernel's answer alone.
    done = enter("--user=root", "--", "sh", "-c", "ls /dev/vsock; cat /dev/vda")
    assert done.returncode != 0
    assert done.stdout == b""


def test_life_of_a_container(box: vmkit.Containers, layout: Path, machine: vmkit.Machine, vmkit: Run, vsh: Run) -> None:
    done = vmkit("container", "ship", "create", "job", f"oci:{layout}", "sh", "-c", "echo said; touch /tmp/x; sleep 60")
    assert done.returncode == 0, done.stderr.decode()
    # The root is there already, for the other container.
    assert machine.run(["sh", "-c", f"ls {STORE}/.images | wc -l"]).stdout == b"1\n"
    refused = vsh("--vm_name=ship", "--target_container=job", "--", "true")
    assert refused.returncode == 1
    assert b"the container 'job' is not running\nhint: vmkit container ship start job" in refused.stderr
    assert vmkit("container", "ship", "start", "job").stdout == b"job is running in ship\n"
    listed = json.loads(vmkit("container", "ship", "list", "--json").stdout)
    assert [(one["name"], one["state"]) for one in listed] == [("box", "running"), ("job", "running")]
    wait_until(lambda: b"said" in vmkit("logs", "ship", "--kind", "syslog").stdout, "its output is logged", DEADLINE_S)
    done = vmkit("container", "ship", "exec", "-u", "root", "job", "cat", "/proc/1/cmdline")
    # Its shell has become the last of its commands.
    assert done.stdout == b"sleep\x0060\x00"
    assert vmkit("container", "ship", "rm", "job").returncode == 1
    assert vmkit("container", "ship", "stop", "--timeout", "0", "job").returncode == 0
    # What was written stays.
    assert machine.run(["test", "-e", f"{STORE}/job/upper/tmp/x"]).exit == 0
    assert vmkit("container", "ship", "rm", "job").stdout == b"job is removed\n"
    assert machine.run(["sh", "-c", f"ls {STORE}; losetup -n -l | wc -l"]).stdout == b"box\n1\n"


def test_container_comes_of_a_tar_and_of_dockers_archive(
    box: vmkit.Containers, root_tar: bytes, layout: Path, tmp_path: Path
) -> None:
    (tmp_path / "root.tar.gz").write_bytes(gzip.compress(root_tar, 1))
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}", f"docker-archive:{tmp_path}/saved.tar:job:1")
    sources = {"tar": (str(tmp_path / "root.tar.gz"), "0\n/\n\n")}
    sources["saved"] = (f"docker-archive:{tmp_path}/saved.tar:job:1", "777\n/srv\nimage\n")
    for name, (source, said) in sources.items():
        box.create(name, source, ["/bin/sleep", "60"])
        box.start(name)
        done = box.connect(name).run(["/bin/sh", "-c", 'id -u; pwd; echo "$PLACE"'], text=True)
        assert (done.exit, done.stdout) == (0, said)
        box.remove(name, force=True)


def test_failures_leave_nothing(box: vmkit.Containers, layout: Path, machine: vmkit.Machine, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="there is a container 'box' already"):
        box.create("box", f"oci:{layout}")
    with pytest.raises(MachineError, match="no container 'none'"):
        box.start("none")
    box.create("broken", f"oci:{layout}", ["/no/such/program"])
    with pytest.raises(MachineError, match="could not start"):
        box.start("broken")
    box.remove("broken")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/blob").write_bytes(os.urandom(4 << 20))
    machine.run(["sh", "-c", "cat /dev/zero > /run/full"])
    with pytest.raises(MachineError, match="no room for the container's root"):
        box.create("large", str(tmp_path))
    machine.run(["rm", "/run/full"])
    left = machine.run(["sh", "-c", f"cd {STORE}; ls -A; ls -A .images; mount | grep -c {STORE}"]).stdout.split()
    assert left[:2] == [b".images", b"box"]
    assert len(left) == 4
    assert left[-1] == b"2"


def test_guest_that_dies_while_it_gets_a_container_is_told(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/blob").write_bytes(os.urandom(128 << 20))
    told: list[VshError] = []
    with vmkit.Machine("containers", accelerator="tcg", backend="user", name="wreck", memory=768) as wreck:

        def create() -> None:
            try:
                vmkit.Containers(wreck).create("box", str(tmp_path))
            except VshError as error:
                told.append(error)

        thread = threading.Thread(target=create)
        with nothing_left_open():
            thread.start()
            script = f"until ls {STORE}/.images/.new.*; do sleep 0.1; done; echo c > /proc/sysrq-trigger"
            with pytest.raises(ConnectionLost):
                wreck.run(["sh", "-c", script])
            thread.join(DEADLINE_S)
    assert [error.brief.partition(":")[0] for error in told] == ["lost the connection to machine 'wreck'"]
