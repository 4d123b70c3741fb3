"""Sessions in another root: the mount namespace of a foreign system that has nothing of vshd's."""

import ast
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import (
    CHECKOUT,
    DEADLINE_S,
    ENVIRONMENT,
    START,
    StartVshd,
    Vshd,
    ended,
    read_line,
    wait_until,
)
from tests.vsh.typist import typing
from tests.vshd.test_init import needs_namespace
from vsh.address import Address
from vsh.client import Client
from vsh.forward.guest import connect_guest
from vsh.forward.trunk import open_trunk
from vshd.root import LATER, open_root
from vshd.services.subsystem import SUBSYSTEMS
from vshd.services.table import SERVICES, Service

VSHD = [sys.executable, "-I", "-S", "-B", "-c", START.format(str(CHECKOUT))]
BUSYBOX = shutil.which("busybox")
pytestmark = [
    needs_namespace,
    pytest.mark.root,
    pytest.mark.skipif(BUSYBOX is None, reason="no busybox to make a root of"),
]
APPLETS = ("sh", "cat", "echo", "env", "id", "ls", "mount", "pwd", "readlink", "rm", "sleep", "stty", "touch", "tty")
# Makes `.` the root of a namespace of its own, and keeps that until its input ends.
KEEP = 'cd "$1" && {mounts} mount --move . / && echo ready && read -r _'
PROC_AND_DEV = "mount -t proc proc proc && mount --rbind /dev dev &&"


class ForeignRoot:
    """A folder as a root, and the process that keeps its namespace."""

    def __init__(self, folder: Path, *, mounts: str = PROC_AND_DEV) -> None:
        self.folder = folder
        script = f'mount --bind "$1" "$1" && {KEEP.format(mounts=mounts)}'
        self.keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.keeper.stdout is not None
        assert read_line(self.keeper.stdout) == "ready"

    @property
    def flag(self) -> str:
        return f"--root_namespace=/proc/{self.keeper.pid}/ns/mnt"

    def stop(self) -> None:
        self.keeper.communicate(timeout=30)


def make_folder(folder: Path, *, is_bare: bool = False) -> Path:
    """A system of busybox alone; is_bare: one static program, and no users, no shell, no folder but those mounted."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    for name in ("proc", "dev"):
        (folder / name).mkdir(parents=True)
    assert BUSYBOX is not None
    if is_bare:
        shutil.copy(BUSYBOX, folder / "busybox")
        return folder
    for name in ("bin", "etc", "root", "tmp", "run", "home/ann"):
        (folder / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, folder / "bin/busybox")
    for applet in (*APPLETS, "true"):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "bin/ash").symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/ash\nann:x:777:777::/home/ann:/bin/ash\n")
    (folder / "etc/group").write_text("root:x:0:\nann:x:777:\nwheel:x:778:ann\n")
    # Code of the root that must never become vshd's.
    for module in ("resource", "fcntl", "encodings/idna"):
        for place in sys.path[-3:]:
            path = folder / place.lstrip("/") / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("import os\nos.mkdir('/run/was-loaded')\n")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForeignRoot]:
    made = ForeignRoot(make_folder(tmp_path_factory.mktemp("foreign")))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def inside(root: ForeignRoot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vshd]:
    """A vshd whose sessions are in the root."""
    server = Vshd(tmp_path_factory.mktemp("vshd"), [root.flag, "--spare_time=5", "--lasting_dir=/run/sessions"])
    yield server
    assert server.stop() == 0, server.log
    assert not (root.folder / "run/was-loaded").exists()


def test_session_has_the_users_and_programs_of_the_root(inside: Vshd, mode: list[str]) -> None:
    done = inside.run(*mode, "--user=ann", "--", "sh", "-c", "id; pwd; echo $HOME $SHELL; readlink /bin/ls")
    groups = "uid=777(ann) gid=777(ann) groups=777(ann),778(wheel)"
    assert done.stdout.decode().splitlines() == [groups, "/home/ann", "/home/ann /bin/ash", "busybox"], done.stderr


def test_session_of_root_may_follow_another_in_the_same_process(inside: Vshd) -> None:
    for _ in range(4):
        assert inside.run("--", "sh", "-c", "pwd; ls /home; readlink /bin/ls").stdout.split() == [
            *(b"/root", b"ann", b"busybox")
        ]


def test_login_shell_and_terminal_are_the_roots(inside: Vshd, mode: list[str]) -> None:
    with typing(inside, *mode) as typist:
        typist.type(b"echo [$0]; tty; stty size; exit 3\r")
        typist.expect(b"[-ash]\r\n/dev/pts/")
        typist.expect(b"30 100\r\n")
        assert typist.wait() == 3


def test_session_gets_nothing_of_vshds(inside: Vshd) -> None:
    environment = inside.run("--", "env").stdout.decode().splitlines()
    names = {line.partition("=")[0] for line in environment}
    assert names <= {"PATH", "TERM", "USER", "LOGNAME", "SHELL", "HOME", "PWD", "SHLVL", "OLDPWD"}
    script = "cd /proc/$$/fd; for fd in *; do readlink $fd; done"
    descriptors = inside.run("--", "sh", "-c", script).stdout.decode().split()
    assert descriptors
    assert all(name.startswith(("pipe:", "/proc/")) for name in descriptors), descriptors
    mounts = inside.run("--", "cat", "/proc/self/mounts").stdout.decode().splitlines()
    assert {line.split()[1].split("/")[1] for line in mounts} <= {"", "proc", "dev"}


def test_session_cannot_leave_by_its_working_directory(inside: Vshd) -> None:
    script = "cd /; for n in 1 2 3 4 5 6 7 8; do cd ..; done; ls"
    assert b"bin\n" in inside.run("--", "sh", "-c", script).stdout
    assert not inside.run("--", "ls", str(CHECKOUT / "vshd")).stdout


def test_program_that_is_not_in_the_root_is_not_found(inside: Vshd) -> None:
    done = inside.run("--", "unshare")
    assert done.returncode == 127
    assert b"command not found" in done.stderr


def test_files_over_sftp_are_the_roots(inside: Vshd, root: ForeignRoot) -> None:
    client = Client(Address.unix(str(inside.path)))
    with client.open("/tmp/new", "w") as file:
        file.write(b"new")
    assert (root.folder / "tmp/new").read_text() == "new"
    with client.open("/etc/passwd") as file:
        assert b"ann" in file.read()


def test_forward_finds_sockets_of_the_root(inside: Vshd, root: ForeignRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.folder / "run")
    address = Address.unix(str(inside.path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("server.sock")
        server.listen()
        server.settimeout(DEADLINE_S)
        fd, early = connect_guest(address, "unix:/run/server.sock", timeout_s=DEADLINE_S)
        with socket.socket(fileno=fd) as client, server.accept()[0] as accepted:
            accepted.sendall(b"hello")
            client.settimeout(DEADLINE_S)
            assert early + client.recv(5 - len(early), socket.MSG_WAITALL) == b"hello"
    trunk = open_trunk(address, "unix:/run/server.sock", "", DEADLINE_S)
    assert trunk is not None
    os.close(trunk.control)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "here"])
def test_forward_finds_names_of_the_root(inside: Vshd, root: ForeignRoot, name: str) -> None:
    (root.folder / "etc/hosts").write_text("127.0.0.1 here localhost\n")
    (root.folder / "etc/nsswitch.conf").write_text("hosts: foreign files\n")
    # Any library will do, where this one's C library looks for one.
    for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line}:
        library = root.folder / path.lstrip("/")
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, library.with_name("libnss_foreign.so.2"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"tcp:{name}:{server.getsockname()[1]}"
        fd, _ = connect_guest(Address.unix(str(inside.path)), target, timeout_s=DEADLINE_S)
        assert inside.children()
        assert not any("libnss" in Path(f"/proc/{pid}/maps").read_text() for pid in inside.children())
        os.close(fd)


def test_lasting_session_runs_in_the_root(inside: Vshd) -> None:
    session = inside.run("--detach=kept", "--", "sh", "-c", "ls /bin/ash; pwd").stdout.decode().strip()
    assert session, inside.log
    assert inside.run("--wait=kept").returncode == 0
    assert inside.run("--output=kept").stdout == b"/bin/ash\n/root\n"
    assert b"kept" in inside.run("--sessions").stdout
    assert inside.run("--forget=kept").returncode == 0


def test_command_of_the_host_runs_in_the_root(root: ForeignRoot, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(tmp_path / "host.sock"))
        host.listen()
        host.settimeout(DEADLINE_S)
        flags = [f"--exec_from=unix:{tmp_path / 'host.sock'}", root.flag, "--log_stderr"]
        started = subprocess.Popen([*VSHD, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE)
        with ended(started) as process, host.accept()[0] as connection:
            connection.sendall(b"readlink /bin/ls; pwd; exit 7")
            out = process.communicate(timeout=DEADLINE_S)[0]
    assert (out, process.returncode) == (b"busybox\n/\n", 7)


def test_root_of_one_program_serves_that_program(tmp_path: Path, start_vshd: StartVshd) -> None:
    bare = ForeignRoot(make_folder(tmp_path / "bare", is_bare=True), mounts="")
    try:
        vshd = start_vshd(bare.flag)
        assert vshd.run("--", "/busybox", "id", "-u").stdout == b"0\n"
        assert vshd.run("--user=12:34", "--", "/busybox", "id").stdout == b"uid=12 gid=34 groups=34\n"
        shell = vshd.run(input=b"")
        assert b"/bin/sh" in shell.stderr
        assert vshd.run("--user=ann", "--", "/busybox").returncode == 1
        # Neither /proc nor /dev, and a session that its client leaves.
        left = vshd.start("--", "/busybox", "cat", stdin=subprocess.PIPE)
        left.kill()
        left.communicate()
        wait_until(lambda: not vshd.children(), "the session has ended")
        assert "Traceback" not in vshd.log
        assert "Error" not in vshd.log
    finally:
        bare.stop()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nonexistent", "No such file or directory"),
        ("/etc/passwd", "no mount namespace"),
        ("/proc/self/ns/net", "no mount namespace"),
    ],
)
def test_namespace_that_is_none_is_refused_at_the_start(path: str, words: str) -> None:
    with pytest.raises(OSError, match=words):
        open_root(path)
    flags = ["--listen=unix:/nonexistent/x", "--log_stderr", f"--root_namespace={path}"]
    done = subprocess.run([*VSHD, *flags], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1
    assert f"cannot use --root_namespace={path}: ".encode() in done.stderr


def find_late_imports(module: str) -> set[str]:
    """What a module of vshd imports within functions."""
    path = CHECKOUT / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = set()
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


# Rows, and for commands no row.
INSIDE: dict[Service | None, tuple[str, ...]] = {
    None: ("vshd.server",),
    **{row: (row.module, *row.later) for row in SERVICES if not row.is_outside},
}
# The server's, which enters no root, and what runs before a session does.
SERVERS = {"vshd.__main__", "vshd.server", "vshd.services.table", "vshd.root"}
# The interpreter has the first two built in, or loads them itself. A session makes its proof before it enters the root.
LOADED = {"_signal", "_socket", "vshd.wire.proof"}


@pytest.mark.parametrize("row", INSIDE, ids=lambda row: "commands" if row is None else row.name)
def test_all_that_a_session_loads_late_is_loaded_before_it_enters_the_root(row: Service | None) -> None:
    script = "import sys; sys.path.insert(0, {!r}); import vshd.__main__, vshd.server, {}; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", script.format(str(CHECKOUT), ", ".join((*LATER, *INSIDE[row])))]
    loaded = set(subprocess.run(argv, capture_output=True, check=True, text=True).stdout.split())
    for module in sorted(loaded - SERVERS):
        if module.startswith("vshd.") and (CHECKOUT / (module.replace(".", "/") + ".py")).exists():
            # The module behind both rows of sessions that last: a client that attaches starts none.
            late = {"vshd.lasting.starting"} if row is not None and row.name == "attached client" else set()
            assert find_late_imports(module) <= loaded | LOADED | late, module


def test_subsystems_are_loaded_before_the_root_is_entered() -> None:
    (row,) = [row for row in SERVICES if row.name == "subsystem"]
    assert {subsystem.module for subsystem in SUBSYSTEMS} == set(row.later)
