"""vsh and vshd over real AF_VSOCK connections: within one guest, by the kernel's loopback, and from host to guest.

That guest is the host VM: it has all that the tests need, and runs in every run anyway. The loopback is there for this
file alone.
"""

import contextlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, DEADLINE_S, Run, find_evidence, run_program
from tests.guest.nested import CID, NAME, NestedHost
from tests.guest.test_wall_layers import EPERM, attempt
from vsh.registry import find_machine

CHECKOUT = Path(__file__).parents[2]
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
SUITE_DEADLINE_S = 600
# In the guest: where the sources are, what says that AF_VSOCK is the tests' own, and what they leave.
SUITE, MARK, LEFT = "/srv/vsock-suite", "/etc/vsh-test-guest", "/srv/vsock-suite-left"
# A test that hangs shows where, and ends before the deadline of the whole.
INI = """\
[pytest]
addopts = -ra --import-mode=importlib
pythonpath = .
markers = vm
faulthandler_timeout = 300
faulthandler_exit_on_timeout = true
"""


@pytest.fixture(scope="module")
def guest(nested_host: NestedHost) -> Iterator[NestedHost]:
    """The host VM with a vsock loopback, our sources and the tests; afterwards it is as it was."""
    with nested_host.loopback():
        nested_host.check("mkdir", SUITE)
        try:
            result = nested_host.run("tar", "-x", "-C", SUITE, input=_pack())
            assert result.exit == 0, result.stderr.decode()
            nested_host.check("touch", MARK)
            yield nested_host
        finally:
            nested_host.check("rm", "-rf", SUITE, MARK, LEFT)


def _pack() -> bytes:
    """Our sources, the tests, and pytest, which is Python alone."""
    buffer = io.BytesIO()
    site = Path(pytest.__file__).parents[1]
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        modules = ("tests/conftest.py", "tests/descriptors.py", "tests/other_user.py")
        for name in ("vsh", "vshd", *modules, "tests/vsh", "tests/vshd", "tests/guest/inside"):
            archive.add(CHECKOUT / name, name, filter=_skip_bytecode)
        for name in (*PYTEST, "py.py"):
            if (site / name).exists():
                archive.add(site / name, name, filter=_skip_bytecode)
        entry = tarfile.TarInfo("pytest.ini")
        entry.size = len(INI)
        archive.addfile(entry, io.BytesIO(INI.encode()))
    return buffer.getvalue()


def _skip_bytecode(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = 0
    return None if entry.name.endswith("__pycache__") else entry


@pytest.mark.parametrize(
    "path",
    [
        "tests/guest/inside/check_vsock.py",
        pytest.param("tests/vsh/test_upstream_faults.py", marks=pytest.mark.slow),
        pytest.param("tests/vsh/test_streams.py", marks=pytest.mark.slow),
        "tests/vsh/test_faults.py",
        "tests/vsh/test_terminal.py",
    ],
)
def test_suite_passes_over_af_vsock(guest: NestedHost, path: str, request: pytest.FixtureRequest) -> None:
    """The same tests that run over UNIX sockets elsewhere."""
    words = ("python3", "-m", "pytest", "-q", f"--basetemp={LEFT}", path)
    result = guest.run(*words, cwd=SUITE, timeout_s=SUITE_DEADLINE_S)
    if result.exit != 0:
        # A suite that could not be read has left nothing.
        collect = f"mkdir -p {LEFT}/logs && cd {LEFT} && find . -path ./logs -prune -o -name '*.log' -exec cp "
        guest.check("sh", "-c", collect + "--parents '{}' logs ';'")
        guest.get(f"{LEFT}/logs", find_evidence(request.node))
    assert result.exit == 0, result.stdout.decode()[-8000:] + result.stderr.decode()
    assert b" passed" in result.stdout


def test_own_vshd_of_the_host_vm_serves_its_host_alone(guest: NestedHost, vsh: Run) -> None:
    """With the loopback there, and its own CID open: its wall refuses every other CID, and its vshd hangs up."""
    assert attempt(vsh, NAME, "stream:1", "stream:13", f"stream:{CID}", user="user") == [EPERM, EPERM, 0]
    lines = [line for line in guest.check("dmesg").splitlines() if "vshd: vsock 1:" in line]
    assert lines
    assert all("refused: this CID is not allowed" in line for line in lines)


# Containers, from the host


@contextlib.contextmanager
def configured(tmp_path: Path, launch: list[str], *, legacy: bool = False) -> Iterator[dict[str, str]]:
    """The environment of a vsh that starts a container's vshd so; legacy: one that proves no token."""
    config = tmp_path / "config.toml"
    words = [word for word in launch if not (legacy and word == "--token_from=stdin")]
    config.write_text(f"[container]\nlaunch = {words!r}\nlegacy = {str(legacy).lower()}\n")
    config.chmod(0o600)
    yield {"VSH_CONFIG": str(config)}


# Processes, mounts and a host name of its own.
LAUNCH = [
    *("unshare", "-p", "-u", "-m", "-f", "--mount-proc"),
    *("sh", "-c", 'echo {container} >/proc/sys/kernel/hostname; cd "$0"; exec "$@"', SUITE),
    *("env", "LANG=daemon", "ONLY=1", "python3", "-m", "vshd", "--inherit_env", "--token_from=stdin"),
    "--forward_to_host_port={port}",
]


@pytest.mark.parametrize("mode", [[], ["--noextended"]], ids=["extended", "legacy"])
def test_container_calls_back_over_vsock(guest: NestedHost, tmp_path: Path, mode: list[str]) -> None:
    script = "cat /proc/sys/kernel/hostname; echo $LANG $ONLY $PPID; wc -c; exit 6"
    with configured(tmp_path, LAUNCH, legacy=bool(mode)) as env:
        words = ["--vm_name", NAME, *mode, "--target_container=box", "--", "LANG=client", "sh", "-c", script]
        done = run_program("vsh", *words, stdin=bytes(3_000_000), env=env)
    assert (done.returncode, done.stdout, done.stderr) == (6, b"box\nclient 1 1\n3000000\n", b"")
    _assert_nothing_is_left(guest)


def test_container_on_a_port_that_was_asked_for(guest: NestedHost, tmp_path: Path) -> None:
    with configured(tmp_path, LAUNCH) as env:
        words = ["--vm_name", NAME, "--listen_port=49200", "--", "cat", "/proc/sys/kernel/hostname"]
        assert run_program("vsh", *words, env=env).stdout == b"penguin\n"
    _assert_nothing_is_left(guest)


def test_client_of_a_container_that_is_killed_leaves_nothing(guest: NestedHost, tmp_path: Path) -> None:
    with configured(tmp_path, LAUNCH) as env:
        argv = [str(BIN / "vsh"), "--vm_name", NAME, "--target_container=box", "--", "sh", "-c", "echo up; sleep 317"]
        client = subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.kill()
        client.wait(DEADLINE_S)
        client.stdout.close()
    script = "for i in $(seq 100); do pgrep -f 'sleep 31[7]' >/dev/null || exit 0; sleep 0.1; done; exit 1"
    guest.check("sh", "-c", script)
    _assert_nothing_is_left(guest)


def _assert_nothing_is_left(guest: NestedHost) -> None:
    """No vshd of a container in the guest, no socket on the host."""
    script = "for i in $(seq 100); do pgrep -f forward_to_host_por[t] >/dev/null || exit 0; sleep 0.1; done; exit 1"
    guest.check("sh", "-c", script)
    machine = find_machine(name=NAME)
    assert machine is not None and machine.vsock is not None
    vsock = Path(machine.vsock)
    assert not [path for path in vsock.parent.glob(f"{vsock.name}_*") if int(path.name.rpartition("_")[2]) >= 49152]


def test_every_session_leaves_its_line_in_the_kernels_log(guest: NestedHost) -> None:
    """The kernel lets one opening of /dev/kmsg write 10 lines in 5 s: each session has its own."""
    for number in range(25):
        assert guest.run("sh", "-c", f"exit {number}").exit == number
    lines = guest.check("dmesg")
    for number in range(25):
        assert re.search(rf"user root: exit {number} after .*: sh -c exit {number}\n", lines)
