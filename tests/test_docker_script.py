""".ci/docker itself, with an engine and a vmkit that are scripts: how its end ends what it runs, and its status."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.test_workflow import CHECKOUT

DEADLINE_S = 30
DOCKER = "#!/bin/sh\necho 20.10\n"
MKTEMP = "#!/bin/sh\nmkdir {0} && echo {0}\n"
VMKIT = "#!/bin/sh\necho $$\nexec {}\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copy(CHECKOUT / ".ci/docker", tmp_path / ".ci/docker")
    (tmp_path / "bin").mkdir()
    return tmp_path


def start(checkout: Path, vmkit: str) -> "subprocess.Popen[bytes]":
    programs = {"docker": DOCKER, "mktemp": MKTEMP.format(checkout / "work"), "vmkit": VMKIT.format(vmkit)}
    for name, text in programs.items():
        (checkout / "bin" / name).write_text(text)
        (checkout / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{checkout}/bin:{os.environ['PATH']}",
        "DOCKER_HOST": "unix:///nonexistent",
        "VMKIT_DOCKER_BASE": "base",
        "PARTS": "run",
    }
    return subprocess.Popen(
        [checkout / ".ci/docker"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_end_of_the_script_is_that_of_what_it_runs(checkout: Path, number: int, status: int) -> None:
    with start(checkout, "sleep 60") as script:
        assert script.stdout is not None
        pid = int(script.stdout.readline())
        script.send_signal(number)
        assert script.wait(DEADLINE_S) == status
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (checkout / "work").exists()


@pytest.mark.parametrize("status", [0, 3])
def test_status_of_a_part_is_the_scripts(checkout: Path, status: int) -> None:
    with start(checkout, f"sh -c 'exit {status}'") as script:
        script.communicate(timeout=DEADLINE_S)
        assert script.returncode == status
    assert not (checkout / "work").exists()
