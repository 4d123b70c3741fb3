"""A user of a real guest against sessions with a container: it sees the port, calls first and often, and wins none.

With `legacy = true`, where no token is demanded, the same attack must succeed, or these tests are blind.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import BIN, Run
from tests.guest.test_faults import start_session

HIJACKER = Path(__file__).parent / "inside/hijacker.py"
# The container is the guest itself: nothing hides the container's processes from the guest's users.
VSHD = ["python3", "-I", "-m", "vshd", "--forward_to_host_port={port}"]
SESSIONS = 10
ATTACK_S = 60
SECRET = "the-secret-word"


@pytest.fixture
def attack(ready: str, vsh: Run) -> Callable[[], "subprocess.Popen[bytes]"]:
    """Starts the attack as uid 1000; it ends by itself."""
    vsh("--vm_name", ready, "--", "sh", "-c", "cat > /tmp/hijacker.py", stdin=HIJACKER.read_bytes())

    def start() -> "subprocess.Popen[bytes]":
        words = ["python3", "-I", "/tmp/hijacker.py", str(ATTACK_S), SECRET]
        attacker = start_session(ready, *words, user="user")
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"ready\n"
        return attacker

    return start


def run_in_container(
    name: str, folder: Path, launch: list[str], *, legacy: bool
) -> "subprocess.CompletedProcess[bytes]":
    config = folder / "config.toml"
    config.touch(mode=0o600)
    config.write_text(f"[container]\nlaunch = {launch!r}\nlegacy = {str(legacy).lower()}\n")
    words = ["--vm_name", name, "--target_container=box", "--", "sh", "-c", "cat; exit 6", SECRET]
    return subprocess.run(
        [str(BIN / "vsh"), *words],
        input=b"real\n",
        capture_output=True,
        timeout=90,
        check=False,
        env={**os.environ, "VSH_CONFIG": str(config)},
    )


def finish(attacker: "subprocess.Popen[bytes]") -> tuple[int, int]:
    out, errors = attacker.communicate(timeout=ATTACK_S + 60)
    assert attacker.returncode == 0, errors.decode()
    connected, won = map(int, out.split())
    return connected, won


def test_users_of_the_guest_win_no_session_of_a_container(
    ready: str, attack: Callable[[], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    attacker = attack()
    done = [run_in_container(ready, tmp_path, [*VSHD, "--token_from=stdin"], legacy=False) for _ in range(SESSIONS)]
    connected, won = finish(attacker)
    print(f"{connected} connections of the attacker, {won} sessions won")
    assert [(one.returncode, one.stdout, one.stderr) for one in done] == [(6, b"real\n", b"")] * SESSIONS
    assert won == 0
    assert connected >= SESSIONS


@pytest.mark.slow
def test_attack_succeeds_where_no_token_is_demanded(
    ready: str, attack: Callable[[], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    attacker = attack()
    done = [run_in_container(ready, tmp_path, VSHD, legacy=True) for _ in range(3)]
    _, won = finish(attacker)
    assert won > 0
    assert (0, b"forged\n") in [(one.returncode, one.stdout) for one in done]
