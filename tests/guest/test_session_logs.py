"""What happened in a machine: `vmkit logs --kind sessions`, and `vmkit up --record`, of a real guest."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.guest.conftest import DEADLINE_S, Run


def find_sessions(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_sessions_of_a_machine_are_logged_and_recorded(up: Run, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    done = up("--name", "seen", "-q", "--record", str(folder))
    assert done.returncode == 0, done.stderr.decode()
    argv = [sys.executable, "-m", "vmkit", "logs", "seen", "--kind", "sessions", "--follow"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert vsh("--vm_name=seen", "--", "sh", "-c", "cat; exit 3", stdin=b"12345").returncode == 3
        assert vsh("--vm_name=seen", "--user=nobody", "--", "sleep", "100", "--timeout", "1").returncode != 0
        assert vsh("--vm_name=seen", "--user=no-such-user", "--", "true").returncode != 0
        # A client that is not ours.
        script = "import vmkit; vmkit.find_machine('seen').run(['echo', 'a\\nvshd: forged'])"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE_S, env=os.environ)
        followed = []
        for line in follower.stdout:
            followed.append(json.loads(line))
            if followed[-1]["command"].startswith("echo"):
                break
        done = vmkit("logs", "seen", "--kind", "sessions")
        assert done.stderr == b""
        sessions = find_sessions(done.stdout)
        assert vmkit("down", "seen").returncode == 0
        _, errors = follower.communicate(timeout=DEADLINE_S)
        assert (follower.returncode, errors) == (0, b"")
    assert followed == sessions[: len(followed)]
    found = {session["command"].partition(" ")[0]: session for session in sessions}
    shown = {key: found["sh"][key] for key in ("user", "end", "exit", "bytes_in", "bytes_out")}
    assert shown == {"user": "root", "end": "exit 3", "exit": 3, "bytes_in": 5, "bytes_out": 5}
    assert found["sh"]["peer"].startswith("vsock 2:")
    assert found["sleep"]["user"] == "nobody"
    assert found["true:"]["end"] == "refused"
    assert found["echo"]["command"] == "echo a\\nvshd: forged"
    # The last client was not vsh; the refused session began nowhere.
    recorded = [json.loads(path.read_text().splitlines()[0])["command"][0] for path in sorted(folder.iterdir())]
    assert sorted(recorded) == ["sh", "sleep"]
