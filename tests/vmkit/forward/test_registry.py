"""The registry of forwards: a number is given once, and a forward that cannot have one leaves nothing."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmkit.entries import folder as entries_folder
from vmkit.entries.entry import NEW_PREFIX
from vmkit.errors import HostError
from vmkit.forward.registry import keep, read_kept


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(path))
    return path


def test_forward_gets_the_lowest_free_number(runtime: Path) -> None:
    with keep("a", ("x",)) as entry:
        for taken in ("1", "3"):
            (runtime / "forwards" / taken).mkdir()
        assert entry.publish(("y",)).number == 2
        assert [kept.number for kept in read_kept()] == [2]
    assert read_kept() == []


def test_number_is_not_given_while_another_program_sweeps(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep may have looked at an entry that had the number a moment ago, and would remove ours for it."""
    with keep("a", ("x",)) as entry:
        monkeypatch.setattr(entries_folder, "REGISTRY_DEADLINE_S", 0.05)
        with (runtime / "registry.lock").open() as sweeper:
            fcntl.flock(sweeper, fcntl.LOCK_EX)
            with pytest.raises(HostError, match="another vmkit has held"):
                entry.publish(("y",))
        assert os.listdir(runtime / "forwards") == [f"{NEW_PREFIX}{os.getpid()}"]
        assert entry.publish(("y",)).number == 1


def test_full_disk_is_told_and_leaves_nothing(runtime: Path) -> None:
    """A process that may write no byte meets EFBIG where a full disk gives ENOSPC."""
    script = (
        "import resource\n"
        "from vmkit.errors import HostError\n"
        "from vmkit.forward.registry import keep\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    with keep('a', ('x',)) as entry: entry.publish(('y',))\n"
        "except HostError as error: print(error.brief)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.startswith("cannot write to the runtime directory"), done.stderr
    assert os.strerror(errno.EFBIG) in done.stdout
    assert os.listdir(runtime / "forwards") == []
