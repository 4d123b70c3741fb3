"""This host's files as a folder: what a program has there, and that nobody else sees the mounts."""

import ctypes
import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.other_user import SOMEBODY_ELSE, ask_as_other
from vmkit.machine import host_view
from vmkit.machine.host_view import COVERED
from vmkit.machine.virtiofsd import plan_view

DEADLINE_S = 60
# linux/prctl.h.
PR_SET_DUMPABLE = 4
LOOK = """
cd "$0" && ls -A && for name in dev proc run sys tmp; do echo $name: $(ls -A $name); done
touch tmp/new 2>/dev/null || echo refused
echo "$1"
"""


def see(folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    words = plan_view(folder, argv)
    return subprocess.run(words, capture_output=True, timeout=DEADLINE_S, check=False, text=True)


def can_mount(folder: Path) -> bool:
    return see(folder, "true").returncode == 0


def test_root_is_at_the_folder_for_the_program_alone(tmp_path: Path) -> None:
    """Without what is of this host's processes, and with a program's own words and status."""
    folder = tmp_path / "a view"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("this host gives no mount namespace")
    done = see(folder, "sh", "-c", LOOK, str(folder), "{frontend}")
    lines = done.stdout.splitlines()
    assert set(os.listdir("/")) <= set(lines), done
    there = [f"{name}:" for name in COVERED if Path(f"/{name}").is_dir() and not Path(f"/{name}").is_symlink()]
    assert set(there) <= set(lines)
    assert lines[-2:] == ["refused", "{frontend}"]
    assert list(folder.iterdir()) == []
    assert see(folder, "sh", "-c", "exit 7").returncode == 7


def test_program_that_is_missing_is_named(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this host gives no mount namespace")
    done = see(tmp_path, "/nonexistent/virtiofsd")
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot show / at {tmp_path} to /nonexistent/virtiofsd: [Errno {errno.ENOENT}]")
    done = see(tmp_path / "missing", "true")
    assert done.returncode == 1
    assert str(tmp_path / "missing") in done.stderr


@pytest.mark.root
def test_user_keeps_its_number(folders: Path) -> None:
    """In a user namespace of its own."""
    folders.chmod(0o755)
    folder = folders / "view"
    folder.mkdir(mode=0o755)

    def look() -> tuple[int, int, bool, bool]:
        # A process that has changed its user may not write its /proc/self/uid_map.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        host_view.enter_namespace()
        host_view.bind_root(str(folder))
        return (
            os.geteuid(),
            os.getegid(),
            Path(f"{folder}/usr").is_dir(),
            Path(f"{folder}/proc/1").exists(),
        )

    answer = ask_as_other(look)
    if answer.startswith("PermissionError"):
        pytest.skip(f"this host gives users no mount namespace: {answer}")
    assert answer == str((SOMEBODY_ELSE, SOMEBODY_ELSE, True, False))
    assert list(folder.iterdir()) == []
