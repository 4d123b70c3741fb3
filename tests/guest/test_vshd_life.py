"""vshd's life in a real guest: it is started again under its sessions, and outlives what users of the guest do."""

import subprocess
from collections.abc import Callable

from tests.guest.test_faults import start_session

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
# A session's process is the shell's parent, and vshd is that one's.
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
