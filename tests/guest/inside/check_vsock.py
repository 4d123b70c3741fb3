"""What only a kernel with vsock can show; run in a guest, hence the name (tests/guest/test_vsock_sessions.py)."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.conftest import mode, start_vshd, vshd
from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, PORTS, START, StartVshd, ended, find_own_cid
from tests.vshd.test_server import make_setup, read_events
from vshd.wire.events import Broken, Exited

__all__ = ["mode", "start_vshd", "vshd"]

PYTHONPATH = ["env", f"PYTHONPATH={CHECKOUT}"]
# The CID that the kernel's loopback gives who connects.
LOOPBACK_CID = 1


def test_peer_that_is_not_the_host_is_closed_unheard(start_vshd: StartVshd) -> None:
    vshd = start_vshd(allow_loopback=False)
    client, setup = make_setup(b"true")
    with vshd.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(setup)
        (event,) = read_events(connection, client)
    assert isinstance(event, Broken)
    assert "refused: this CID is not allowed" in vshd.log
    assert f"vsock {LOOPBACK_CID}:" in vshd.log
    done = vshd.run("--", "true")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"hint: its log has the reason, such as a CID that it does not serve" in done.stderr
    assert not vshd.children()


def test_peer_is_served_when_its_cid_is_allowed(start_vshd: StartVshd, mode: list[str]) -> None:
    assert start_vshd("--allow_cid=1", allow_loopback=False).run(*mode, "--", "echo", "hi").stdout == b"hi\n"
    assert start_vshd("--allow-cid=any", allow_loopback=False).run(*mode, "--", "echo", "hi").stdout == b"hi\n"
    assert start_vshd("--allow_cid=3", allow_loopback=False).run(*mode, "--", "echo", "hi").returncode == 1


def test_socket_of_systemd_is_a_vsock_too() -> None:
    """LISTEN_FDS: who may connect is checked on a passed socket as on one of vshd's own."""
    port = next(PORTS)
    for flags, expected in (((), Broken), (("--allow_cid=1",), Exited)):
        with socket.socket(socket.AF_VSOCK) as listener:
            listener.bind((socket.VMADDR_CID_ANY, port))
            listener.listen()
            script = 'import os; os.environ["LISTEN_PID"] = str(os.getpid()); ' + START.format(str(CHECKOUT))
            daemon = subprocess.Popen(
                [
                    *("bash", "-c", f'exec 3<&{listener.fileno()}; exec "$@"', "bash"),
                    *(sys.executable, "-I", "-S", "-c", script, "--log_stderr", *flags),
                ],
                env={**ENVIRONMENT, "LISTEN_FDS": "1"},
                pass_fds=[listener.fileno()],
                stderr=subprocess.DEVNULL,
            )
        with ended(daemon):
            client, setup = make_setup(b"true")
            with socket.socket(socket.AF_VSOCK) as connection:
                connection.settimeout(DEADLINE_S)
                connection.connect((find_own_cid(), port))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(setup)
                assert isinstance(read_events(connection, client)[-1], expected)
            daemon.terminate()
            assert daemon.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("legacy", [False, True], ids=["with the token", "legacy"])
def test_container_that_answers_from_another_guest_is_refused(
    start_vshd: StartVshd, tmp_path: Path, legacy: bool
) -> None:
    """vsh asked the vshd of one CID to have it called back, and another CID calls."""
    vshd = start_vshd()
    launch = [
        *PYTHONPATH,
        sys.executable,
        "-m",
        "vshd",
        "--log_stderr",
        f"--forward_to=vsock:{find_own_cid()}:{{port}}",
    ]
    config = tmp_path / "config.toml"
    config.write_text(
        f"[container]\nlaunch = {[*launch, *([] if legacy else ['--token_from=stdin'])]!r}\n"
        f"legacy = {str(legacy).lower()}\n"
    )
    config.chmod(0o600)
    done = vshd.run("--target_container=box", "--", "true", env={**ENVIRONMENT, "VSH_CONFIG": str(config)})
    assert done.returncode == 1
    assert f"Received connection from VM {LOOPBACK_CID} but expected {find_own_cid()}".encode() in done.stderr


def test_daemon_that_nobody_waits_for_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vshd", "--forward_to_host_port=49151", "--log_stderr"],
        env=ENVIRONMENT,
        cwd=CHECKOUT,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert b"Failed to connect to vsh client" in done.stderr


def test_port_that_is_taken_is_told() -> None:
    """9001 is that of the guest's own vshd."""
    done = subprocess.run(
        [sys.executable, "-m", "vshd", "--log_stderr"],
        env=ENVIRONMENT,
        cwd=CHECKOUT,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert b"Failed to bind vshd port" in done.stderr
