"""Container mode over UNIX sockets: a namespace container, and a launcher that is a command in the guest."""

import subprocess
import sys

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, wait_until
from tests.vshd.test_init import needs_namespace

VSHD = [sys.executable, "-m", "vshd", "--inherit_env", "--log_stderr", "--forward_to={place}"]
# A container: processes, mounts and a host name of its own.
CONTAINER = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
PYTHONPATH = ["env", f"PYTHONPATH={CHECKOUT}", "VSH_AF_VSOCK=deny"]


@pytest.fixture
def run(vshd, tmp_path):
    """Runs vsh with a launch command of the test's own."""

    def run(launch, *words):
        path = tmp_path / "config.toml"
        path.write_text(f"[container]\nlaunch = {launch!r}\n")
        path.chmod(0o600)
        env = {**ENVIRONMENT, "VSH_CONFIG": str(path)}
        return subprocess.run(vshd.argv(*words), env=env, capture_output=True, check=False, timeout=DEADLINE_S)

    yield run
    wait_until(lambda: not vshd.children(), "the launcher's session has ended")


@needs_namespace
def test_command_runs_in_the_container(run, mode):
    launch = [*CONTAINER, "sh", "-c", 'hostname the-container; exec "$@"', "sh", *PYTHONPATH, *VSHD]
    done = run(launch, *mode, "--target_container=box", "--", "sh", "-c", "hostname; echo $PPID; exit 6")
    assert (done.returncode, done.stdout) == (6, b"the-container\n1\n"), done.stderr


def test_launcher_knows_the_containers_name(run):
    launch = [*PYTHONPATH, "CONTAINER={container}", *VSHD]
    done = run(launch, "--target_container=box", "--", "sh", "-c", "echo $CONTAINER")
    assert (done.returncode, done.stdout) == (0, b"box\n"), done.stderr


def test_port_alone_means_the_default_container(run):
    launch = [*PYTHONPATH, "CONTAINER={container}", *VSHD]
    done = run(launch, "--listen_port=50000", "--", "sh", "-c", "echo $CONTAINER")
    assert (done.returncode, done.stdout) == (0, b"penguin\n"), done.stderr


def test_launcher_that_fails_is_told_with_its_words(run):
    done = run(["sh", "-c", "echo no such container: {container} >&2; exit 1"], "--target_container=box")
    assert done.returncode == 1
    assert b"Failed to launch vshd for" in done.stderr
    assert b"no such container: box" in done.stderr


def test_launcher_that_does_nothing_is_given_up(run):
    done = run(["sleep", "60"], "--target_container=box")
    assert done.returncode == 1
    assert b"Poll timed out after waiting 5 seconds." in done.stderr


def test_launcher_that_is_not_there(run):
    done = run(["no-such-launcher"], "--target_container=box")
    assert done.returncode == 127
    assert b"no-such-launcher: command not found" in done.stderr


def test_no_launcher_is_configured(vshd):
    done = vshd.run("--target_container=box")
    assert done.returncode == 1
    assert b"do not know how to start a vshd in a container" in done.stderr


def test_daemon_that_reaches_nobody_says_so(tmp_path):
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
