"""Container mode over UNIX sockets: a namespace container, and a launcher that is a command in the guest."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, OWN_USER, Vshd, wait_until
from tests.vsh.strangers import KINDS
from tests.vshd.test_init import needs_namespace
from vsh.callers import CALLERS_MAX

UNPROVEN = [sys.executable, "-m", "vshd", "--inherit_env", "--log_stderr", "--forward_to={place}", *OWN_USER]
VSHD = [*UNPROVEN, "--token_from=stdin"]
# A container: processes, mounts and a host name of its own.
CONTAINER = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
PYTHONPATH = ["env", f"PYTHONPATH={CHECKOUT}", "VSH_AF_VSOCK=deny"]


class RunContainer(Protocol):
    """The fixture run."""

    def __call__(self, launch: list[str], *words: str, legacy: bool = False) -> subprocess.CompletedProcess[bytes]: ...


@pytest.fixture
def run(vshd: Vshd, tmp_path: Path) -> Iterator[RunContainer]:
    """Runs vsh with a launch command of the test's own."""

    def run(launch: list[str], *words: str, legacy: bool = False) -> subprocess.CompletedProcess[bytes]:
        path = tmp_path / "config.toml"
        path.write_text(f"[container]\nlaunch = {launch!r}\nlegacy = {str(legacy).lower()}\n")
        path.chmod(0o600)
        env = {**ENVIRONMENT, "VSH_CONFIG": str(path)}
        return subprocess.run(vshd.argv(*words), env=env, capture_output=True, check=False, timeout=2 * DEADLINE_S)

    yield run
    wait_until(lambda: not vshd.children(), "the launcher's session has ended")


@needs_namespace
def test_command_runs_in_the_container(run: RunContainer, mode: list[str]) -> None:
    vshd = UNPROVEN if mode else VSHD
    launch = [*CONTAINER, "sh", "-c", 'hostname the-container; exec "$@"', "sh", *PYTHONPATH, *vshd]
    words = [*mode, "--target_container=box", "--", "sh", "-c", "hostname; echo $PPID; exit 6"]
    done = run(launch, *words, legacy=bool(mode))
    assert (done.returncode, done.stdout) == (6, b"the-container\n1\n"), done.stderr


def test_launcher_knows_the_containers_name(run: RunContainer) -> None:
    launch = [*PYTHONPATH, "CONTAINER={container}", *VSHD]
    done = run(launch, "--target_container=box", "--", "sh", "-c", "echo $CONTAINER")
    assert (done.returncode, done.stdout) == (0, b"box\n"), done.stderr


def test_port_alone_means_the_default_container(run: RunContainer) -> None:
    launch = [*PYTHONPATH, "CONTAINER={container}", *VSHD]
    done = run(launch, "--listen_port=50000", "--", "sh", "-c", "echo $CONTAINER")
    assert (done.returncode, done.stdout) == (0, b"penguin\n"), done.stderr


def test_launcher_that_fails_is_told_with_its_words(run: RunContainer) -> None:
    done = run(["sh", "-c", "echo no such container: {container} >&2; exit 1"], "--target_container=box")
    assert done.returncode == 1
    assert b"Failed to launch vshd for" in done.stderr
    assert b"no such container: box" in done.stderr


def test_launcher_that_does_nothing_is_given_up(run: RunContainer) -> None:
    done = run(["sleep", "60"], "--target_container=box")
    assert done.returncode == 1
    assert b"the container's vshd did not connect in time" in done.stderr


def test_launcher_that_is_not_there(run: RunContainer) -> None:
    done = run(["no-such-launcher"], "--target_container=box")
    assert done.returncode == 127
    assert b"no-such-launcher: command not found" in done.stderr


# Who it is that connects


def test_vshd_without_the_token_is_not_taken(run: RunContainer) -> None:
    done = run([*PYTHONPATH, *UNPROVEN], "--target_container=box", "--", "echo", "taken")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"1 connections did not prove the token; the last: it has no token" in done.stderr
    assert b"--token_from=stdin" in done.stderr


def test_chromeos_vshd_is_taken_only_where_the_configuration_says_so(run: RunContainer) -> None:
    launch = [*PYTHONPATH, *UNPROVEN, "--noextended"]
    done = run(launch, "--target_container=box", "--", "echo", "taken")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"it speaks ChromeOS's protocol, which knows no tokens" in done.stderr
    assert run(launch, "--target_container=box", "--", "echo", "taken", legacy=True).stdout == b"taken\n"
    done = run([*PYTHONPATH, *VSHD], "--noextended", "--target_container=box", "--", "echo", "taken")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"demands its token, which ChromeOS's protocol cannot prove" in done.stderr


@pytest.mark.parametrize("token", [b"", b"vmkit.token:00\n", b"x" * 300, b"vmkit.token:" + b"0" * 64])
def test_vshd_that_gets_no_token_connects_nowhere(tmp_path: Path, token: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "host"))
        listener.listen()
        argv = [word.replace("{place}", f"unix:{tmp_path}/host") for word in VSHD]
        # The last token is one, but this client is asked for no proof and cannot be served.
        last = ["--noextended"] if token.endswith(b"0" * 64) else []
        done = subprocess.run(
            [*argv, *last], input=token, env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_S
        )
        assert done.returncode == 1
        assert b"token" in done.stderr
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("kind", KINDS)
def test_stranger_that_calls_first_gets_nothing(run: RunContainer, kind: str) -> None:
    """Forged output, forged exits, stalled and repeated calls: the session is the container's, and untouched."""
    # More than are examined at once, where none waits for an answer.
    count = 2 * CALLERS_MAX if kind in ("say_nothing", "say_nonsense", "leave") else 3
    script = f'"$1" -m tests.vsh.strangers {kind} {{place}} {count}; shift; exec "$@"'
    launch = [*PYTHONPATH, "sh", "-c", script, "sh", sys.executable, *VSHD]
    done = run(launch, "--target_container=box", "--", "sh", "-c", "echo real; exit 6")
    assert (done.returncode, done.stdout, done.stderr) == (6, b"real\n", b"")


# One that says nothing is waited for, as long as a vshd in a container may take.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "say_nothing"])
def test_stranger_is_not_taken_when_nobody_else_calls(run: RunContainer, kind: str) -> None:
    script = f'exec "$0" -m tests.vsh.strangers {kind} {{place}} 2'
    launch = [*PYTHONPATH, "sh", "-c", script, sys.executable]
    done = run(launch, "--target_container=box", "--", "sh", "-c", "echo taken; exit 0")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"sent more than the stub" not in done.stderr


SPY = """
import os, sys
secret = sys.stdin.readline().strip()
assert secret.startswith("vmkit.token:") and len(secret) == 76
for name in ("cmdline", "environ"):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert secret[12:].encode() not in open(f"/proc/{pid}/{name}", "rb").read(), (pid, name)
        except OSError:
            pass
print("the token is on standard input alone", file=sys.stderr)
sys.exit(1)
"""


def test_token_is_in_no_argument_and_in_no_environment(run: RunContainer) -> None:
    done = run([sys.executable, "-c", SPY], "--target_container=box")
    assert b"the token is on standard input alone" in done.stderr


def test_every_session_has_a_token_of_its_own(run: RunContainer) -> None:
    launch = ["sh", "-c", "sha256sum >&2; exit 1"]
    said = {run(launch, "--target_container=box").stderr for _ in range(2)}
    assert len(said) == 2


def test_no_launcher_is_configured(vshd: Vshd) -> None:
    done = vshd.run("--noextended", "--target_container=box")
    assert done.returncode == 1
    assert b"the configuration has no command that starts a vshd in a container" in done.stderr


def test_daemon_that_reaches_nobody_says_so(tmp_path: Path) -> None:
    for where, text in (
        (f"unix:{tmp_path}/none", b"Failed to connect to vsh client"),
        ("vsock:2:50000", b"AF_VSOCK is denied"),
        ("vsock:2:4294967295", b"Port 4294967295 is not a valid port"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vshd", "--log_stderr", f"--forward_to={where}"],
            env=ENVIRONMENT,
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 1
        assert text in done.stderr
