"""Completion as a shell asks for it: the program is run with click's variables, and its answer read."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmkit.cli.completion import SHELLS

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAM = [sys.executable, "-m", "vmkit"]
DEADLINE_S = 60


def complete(*words: str, environ: dict[str, str] | None = None) -> set[str]:
    line = ["vmkit", *words]
    env = {
        **os.environ,
        **(environ or {}),
        "_VMKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    done = subprocess.run(PROGRAM, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return {answer.partition(",")[2] for answer in done.stdout.splitlines()} - {""}


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_printed(shell: str) -> None:
    done = subprocess.run(
        [*PROGRAM, "completion", shell], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert "_VMKIT_COMPLETE" in done.stdout


def test_verbs_and_options() -> None:
    assert {"up", "down", "docker"} <= complete("")
    assert complete("dow") == {"down"}
    assert "--memory" in complete("up", "--me")
    assert complete("docker", "b") == {"build", "bench"}
    assert complete("vsock", "") == {"trace", "fault"}
    assert complete("vsock", "fault", "tiny", "re") == {"reset", "refuse"}
    assert "to-guest" in complete("vsock", "trace", "--direction", "")


def test_images() -> None:
    assert {"tiny", "debian"} <= complete("up", "")
    assert complete("build", "ti") == {"tiny"}


@pytest.mark.parametrize("verb", ["down", "status", "logs", "dmesg", "console", "wait", "kill"])
def test_machines_that_run(verb: str, tmp_path: Path) -> None:
    """An entry that nobody holds is of a machine that has ended."""
    tmp_path.chmod(0o700)
    held = []
    for cid, name in enumerate(("running", "ended"), start=3):
        entry = tmp_path / "machines" / name
        entry.mkdir(parents=True, mode=0o700)
        record = {"schema": 1, "name": name, "cid": cid, "backend": "user", "state": "ready", "vsock": None, "pid": 1}
        (entry / "machine.json").write_text(json.dumps(record))
        held.append((entry / "lock").open("w"))
    fcntl.flock(held[0], fcntl.LOCK_EX)
    assert complete(verb, "", environ={"VMKIT_RUNTIME_DIR": str(tmp_path)}) == {"running"}
    for lock in held:
        lock.close()


@pytest.mark.parametrize("program", ["vmkit", "vsh"])
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to load the script")
def test_shipped_bash_script_loads(program: str, tmp_path: Path) -> None:
    for name in ("vmkit", "vsh"):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    script = f". {CHECKOUT}/completions/{program}.bash && complete -p {program}"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert program in done.stdout
