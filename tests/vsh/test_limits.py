"""Limits of the process (ulimit): the cause and the remedy are printed, whatever step meets the limit."""

import errno
import resource
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd
from vsh.errors import VshError
from vsh.limits import add_remedy, find_remedy


@pytest.mark.parametrize("count", range(5, 13))
def test_few_descriptors_are_named_as_the_cause_or_are_enough(vshd: Vshd, count: int) -> None:
    done = vshd.run("--", "echo", "hi", limits=f"-n {count}")
    if done.returncode == 0:
        assert done.stdout == b"hi\n"
        return
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith("vsh: ")
    assert "Too many open files" in lines[0]
    assert lines[-1] == f"hint: this process may open {count} files; raise the limit: ulimit -n 1024"


def test_limit_of_a_files_size_is_named(vshd: Vshd, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        words = ("--", "head", "-c", "100000", "/dev/zero")
        # Where the limit cuts a .pyc file short, Python keeps it, and no later process can load that module.
        env = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
        # In blocks of 512 bytes.
        process = vshd.start(*words, stdout=file, env=env, limits="-f 8")
        _, text = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert text.decode().splitlines() == [
        "vsh: cannot write stdout: File too large",
        "hint: a file may have 4096 bytes; raise the limit: ulimit -f unlimited",
    ]


def test_limit_below_another_failure_is_found() -> None:
    error = VshError("cannot start it", hint="look at it")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    assert "ulimit -n" in add_remedy(error).hint
    assert add_remedy(VshError("other", hint="kept")).hint == "kept"


@pytest.mark.parametrize(
    ("number", "error", "option"),
    [
        (resource.RLIMIT_AS, MemoryError(), "ulimit -v"),
        (resource.RLIMIT_NPROC, RuntimeError("can't start new thread"), "ulimit -u"),
        (resource.RLIMIT_NPROC, BlockingIOError(errno.EAGAIN, "fork"), "ulimit -u"),
        (resource.RLIMIT_FSIZE, OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    ],
)
def test_limit_is_named_only_where_there_is_one(number: int, error: Exception, option: str) -> None:
    limits = resource.getrlimit(number)
    resource.setrlimit(number, (limits[1], limits[1]))
    try:
        expected = limits[1] != resource.RLIM_INFINITY
        assert (option in find_remedy(error)) == expected
        if not expected:
            resource.setrlimit(number, (1 << 40, limits[1]))
            assert option in find_remedy(error)
    finally:
        resource.setrlimit(number, limits)


def test_other_failures_have_no_remedy() -> None:
    assert find_remedy(OSError(errno.ENOENT, "No such file")) == ""
    assert find_remedy(RuntimeError("x")) == ""
