"""vsh and vshd over real AF_VSOCK connections: within one guest, by the kernel's loopback, and from host to guest."""

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, DEADLINE_S, Run, run_program
from vmkit.machine import stop
from vsh.registry import find_machine

CHECKOUT = Path(__file__).parents[2]
NAME = "vsock-sessions"
# A whole Python for pytest, Debian's tools for the tests' scripts, and connections within the guest, which the wall
# would refuse.
RECIPE = """
extends = "tiny"
packages = ["python3", "bash", "dash", "coreutils", "procps"]
modules = ["vsock_loopback"]

[wall]
transport = false
kernel = false

[files]
"/etc/vsh-test-guest" = { content = "AF_VSOCK leads to this guest itself\\n" }
"/srv" = { directory = true }
"""
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
SUITE_DEADLINE_S = 600
INI = "[pytest]\naddopts = -ra --import-mode=importlib\npythonpath = .\nmarkers = vm\n"


@pytest.fixture(scope="module")
def guest(vmkit: Run, vsh: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """guest(argv...) runs a command in a guest that has our sources and tests."""
    recipe = tmp_path_factory.mktemp("recipe") / "vsock.toml"
    recipe.write_text(RECIPE)
    done = vmkit("up", str(recipe), "--accel", "tcg", "--name", NAME, "--memory", "1500M", timeout_s=600)
    assert done.returncode == 0, done.stderr.decode()
    try:
        done = vsh("--vm_name", NAME, "--", "tar", "-x", "-C", "/srv", stdin=_pack())
        assert done.returncode == 0, done.stderr.decode()

        def run(*words: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
            return vsh("--vm_name", NAME, "--cwd=/srv", "--", *words, **options)

        yield run
    finally:
        machine = find_machine(name=NAME)
        if machine is not None:
            stop.kill(machine)


def _pack() -> bytes:
    """Our sources, the tests, and pytest, which is Python alone."""
    buffer = io.BytesIO()
    site = Path(pytest.__file__).parents[1]
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("vsh", "vshd", "tests/conftest.py", "tests/vsh", "tests/vshd", "tests/guest/inside"):
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
        "tests/vsh/test_section8.py",
        "tests/vsh/test_streams.py",
        "tests/vsh/test_faults.py",
        "tests/vsh/test_terminal.py",
    ],
)
def test_suite_passes_over_af_vsock(guest: Run, path: str) -> None:
    """The same tests that run over UNIX sockets elsewhere."""
    done = guest("python3", "-m", "pytest", "-q", path, timeout_s=SUITE_DEADLINE_S)
    assert done.returncode == 0, done.stdout.decode()[-8000:] + done.stderr.decode()
    assert b" passed" in done.stdout


# Containers, from the host


@contextlib.contextmanager
def configured(tmp_path: Path, launch: list[str]) -> Iterator[dict[str, str]]:
    """The environment of a vsh that starts a container's vshd so."""
    config = tmp_path / "config.toml"
    config.write_text(f"[container]\nlaunch = {launch!r}\n")
    config.chmod(0o600)
    yield {"VSH_CONFIG": str(config)}


# Processes, mounts and a host name of its own.
LAUNCH = [
    *("unshare", "-p", "-u", "-m", "-f", "--mount-proc"),
    *("sh", "-c", 'echo {container} >/proc/sys/kernel/hostname; cd /srv; exec "$@"', "sh"),
    *("env", "LANG=daemon", "ONLY=1", "python3", "-m", "vshd", "--inherit_env", "--forward_to_host_port={port}"),
]


@pytest.mark.parametrize("mode", [[], ["--noextended"]], ids=["extended", "legacy"])
def test_container_calls_back_over_vsock(guest: Run, tmp_path: Path, mode: list[str]) -> None:
    script = "cat /proc/sys/kernel/hostname; echo $LANG $ONLY $PPID; wc -c; exit 6"
    with configured(tmp_path, LAUNCH) as env:
        words = ["--vm_name", NAME, *mode, "--target_container=box", "--", "LANG=client", "sh", "-c", script]
        done = run_program("vsh", *words, stdin=bytes(3_000_000), env=env)
    assert (done.returncode, done.stdout, done.stderr) == (6, b"box\nclient 1 1\n3000000\n", b"")
    _assert_nothing_is_left(guest)


def test_container_on_a_port_that_was_asked_for(guest: Run, tmp_path: Path) -> None:
    with configured(tmp_path, LAUNCH) as env:
        words = ["--vm_name", NAME, "--listen_port=49200", "--", "cat", "/proc/sys/kernel/hostname"]
        assert run_program("vsh", *words, env=env).stdout == b"penguin\n"
    _assert_nothing_is_left(guest)


def test_client_of_a_container_that_is_killed_leaves_nothing(guest: Run, tmp_path: Path) -> None:
    with configured(tmp_path, LAUNCH) as env:
        argv = [str(BIN / "vsh"), "--vm_name", NAME, "--target_container=box", "--", "sh", "-c", "echo up; sleep 317"]
        client = subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.kill()
        client.wait(DEADLINE_S)
        client.stdout.close()
    script = "for i in $(seq 100); do pgrep -f 'sleep 31[7]' >/dev/null || exit 0; sleep 0.1; done; exit 1"
    assert guest("sh", "-c", script).returncode == 0
    _assert_nothing_is_left(guest)


def _assert_nothing_is_left(guest: Run) -> None:
    """No vshd of a container in the guest, no socket on the host."""
    script = "for i in $(seq 100); do pgrep -f forward_to_host_por[t] >/dev/null || exit 0; sleep 0.1; done; exit 1"
    assert guest("sh", "-c", script).returncode == 0
    machine = find_machine(name=NAME)
    assert machine is not None and machine.vsock is not None
    vsock = Path(machine.vsock)
    assert not [path for path in vsock.parent.glob(f"{vsock.name}_*") if int(path.name.rpartition("_")[2]) >= 49152]


def test_every_session_leaves_its_line_in_the_kernels_log(guest: Run) -> None:
    """The kernel lets one opening of /dev/kmsg write 10 lines in 5 s: each session has its own."""
    for number in range(25):
        assert guest("sh", "-c", f"exit {number}").returncode == number
    lines = guest("dmesg").stdout.decode()
    for number in range(25):
        assert f"user root: sh -c exit {number}: exit {number} after" in lines
