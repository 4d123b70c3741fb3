"""vshd's life in a real guest: it is started again under its sessions, and outlives what users of the guest do."""

from pathlib import Path

import pytest

import vmkit
from tests.guest.conftest import Run
from tests.guest.test_faults import start_session
from vsh.registry import find_machine

# A session's process is the shell's parent, and vshd is that one's.
# The kernel signals all of a user's processes at once; whatever forks meanwhile has the signal, too.
END_ALL_OF_THE_USER = """
python3 -c 'import os; os.setuid(1000); os.kill(-1, 9)'
rm -f /tmp/bomb /dev/shm/bomb /var/tmp/bomb /home/user/bomb
"""
VSHD_PID = "read -r _ _ _ vshd _ < /proc/$PPID/stat"


def test_restart_of_vshd_leaves_sessions_alone(ready: str, vsh: Run) -> None:
    """pid 1 holds the port: who connects in between waits for the next vshd."""
    session = start_session(ready, "sh", "-c", f"{VSHD_PID}; echo $vshd; cat; exit 7")
    assert session.stdin is not None
    assert session.stdout is not None
    first = session.stdout.readline().strip().decode()
    for _ in range(3):
        assert vsh("--vm_name", ready, "--", "sh", "-c", f"{VSHD_PID}; kill -TERM $vshd; sleep 0.2").returncode == 0
        assert vsh("--vm_name", ready, "--", "sh", "-c", f"{VSHD_PID}; echo $vshd").stdout.strip().decode() != first
    out, _ = session.communicate(b"still\n", timeout=60)
    assert (out, session.returncode) == (b"still\n", 7)
    assert b"vmkit-init: error" not in vsh("--vm_name", ready, "--", "dmesg").stdout


def test_daemon_is_the_last_that_the_oom_killer_takes(ready: str, vsh: Run) -> None:
    """vshd never, a session's own process after everything else, and what it runs as any program."""
    # vshd gives the session's process its score when it hears that the target runs.
    wait = "while [ $(cat $PPID/oom_score_adj) = 0 ]; do :; done"
    script = f"{VSHD_PID}; cd /proc; {wait}; cat $vshd/oom_score_adj $PPID/oom_score_adj self/oom_score_adj"
    assert vsh("--vm_name", ready, "--", "sh", "-c", script).stdout.split() == [b"-1000", b"-900", b"0"]
    lower = "echo -1 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
    done = vsh("--vm_name", ready, "--user", "user", "--", "sh", "-c", lower)
    assert (done.stdout, b"Permission denied" in done.stderr) == (b"0\n", True)


# What a user of the guest starts to take all of it. Each goes on until it is killed.
BOMBS = {
    "shells": ["sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1000"],
    "interpreters": [
        "python3",
        "-c",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass\n bytearray(1 << 18)",
    ],
    "memory": ["python3", "-c", "import os\nos.fork()\nx = []\nwhile True: x.append(bytearray(b'x' * (1 << 20)))"],
    "files": ["sh", "-c", "for f in /tmp /dev/shm /var/tmp ~; do cat /dev/zero > $f/bomb & done; wait; sleep 1000"],
}
ROUNDS = 5
# Root shares the processor with hundreds of processes.
DEADLINE_S = 120.0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "interpreters" else pytest.mark.slow) for name in BOMBS]
)
def test_machine_outlives_a_users_bomb(built: None, folders: Path, vsh: Run, name: str) -> None:
    machine = vmkit.Machine("tiny", accelerator="tcg", backend="user", name="bombed", memory="256M")
    with machine:
        steady = start_session(machine.name, "sh", "-c", "echo in; cat; exit 7")
        assert steady.stdout is not None
        assert steady.stdout.readline() == b"in\n"
        vshd = machine.run(["sh", "-c", f"{VSHD_PID}; echo $vshd"]).stdout
        for _ in range(2):
            bomb = start_session(machine.name, *BOMBS[name], user="user")
            for _ in range(ROUNDS):
                script = "sleep 1; echo root works"
                assert machine.run(["sh", "-c", script], timeout=DEADLINE_S).stdout == b"root works\n"
            machine.run(["sh", "-c", END_ALL_OF_THE_USER], timeout=DEADLINE_S)
            bomb.communicate(timeout=60)
        assert machine.run(["sh", "-c", f"{VSHD_PID}; echo $vshd"]).stdout == vshd
        assert machine.run(["echo", "user works"], user="user").stdout == b"user works\n"
        out, _ = steady.communicate(b"still\n", timeout=60)
        assert (out, steady.returncode) == (b"still\n", 7)
        entry = find_machine(name=machine.name)
        assert entry is not None
        assert "vmkit-init: error" not in (Path(entry.directory) / "console.log").read_text()
