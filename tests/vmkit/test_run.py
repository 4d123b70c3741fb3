"""Other programs: their output in one piece or as it comes, and every way they fail."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.errors import CommandError, HostError
from vmkit.run import open_output, run


@contextlib.contextmanager
def ignoring_children() -> Iterator[None]:
    """As in a program that never waits for its children."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_output_comes_in_one_piece_or_bit_by_bit() -> None:
    script = "printf one; echo two >&2; sleep 0.1; printf three"
    assert run(["sh", "-c", script], timeout_s=10) == b"onethree"
    with open_output(["sh", "-c", script], timeout_s=10) as output:
        assert output.read(2) == b"on"
        assert output.read(100) == b"ethree"
        assert output.read(1) == b""


def test_program_that_fails_is_told_with_its_command_and_its_last_words() -> None:
    script = "seq 1000; echo the cause >&2; exit 3"
    with pytest.raises(CommandError) as caught, open_output(["sh", "-c", script], timeout_s=10) as output:
        assert output.read(2) == b"1\n"
    assert caught.value.brief == "'sh' failed with status 3"
    assert caught.value.details.endswith("\nthe cause")
    assert caught.value.details.startswith("sh -c 'seq 1000")
    with pytest.raises(CommandError, match="'sh' failed with signal 9"):
        run(["sh", "-c", "kill -9 $$"], timeout_s=10)


def test_what_nobody_reads_does_not_fail_the_program() -> None:
    with open_output(["sh", "-c", "seq 100000; echo whole >&2"], timeout_s=10) as output:
        assert output.readline() == b"1\n"


def test_program_that_is_missing_names_its_package() -> None:
    with pytest.raises(HostError, match="cannot find the program 'no-such-program'") as caught:
        run(["no-such-program"], timeout_s=1, package="some")
    assert caught.value.hint == "install it: sudo apt-get install some"
    with pytest.raises(HostError, match="no-such-program"), open_output(["no-such-program"], timeout_s=1):
        pass


def test_program_that_does_not_end_is_killed(tmp_path: Path) -> None:
    # It writes for ever, then not at all, then closes its stdout and stays.
    for script in ("while :; do echo x; done", "sleep 600", "exec >&-; sleep 600"):
        with (
            pytest.raises(CommandError, match=r"'sh' did not end within 0\.3 s"),
            open_output(["sh", "-c", script], timeout_s=0.3) as output,
        ):
            while output.read(1000):
                pass


def test_block_that_is_left_early_ends_the_program(tmp_path: Path) -> None:
    script = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(ZeroDivisionError), open_output([sys.executable, "-c", script], timeout_s=600) as output:
        pid = int(output.readline())
        1 / 0  # noqa: B018
    assert not Path(f"/proc/{pid}").exists()


def test_program_that_closes_its_output_is_still_waited_for() -> None:
    with pytest.raises(CommandError, match="failed with status 3"):
        run(["sh", "-c", "exec >&- 2>&-; sleep 0.2; exit 3"], timeout_s=10)


@pytest.mark.parametrize("status", ["0", "7"])
def test_status_that_is_lost_is_not_guessed(status: str) -> None:
    with ignoring_children(), pytest.raises(HostError, match="cannot tell how 'sh' ended") as caught:
        run(["sh", "-c", f"exit {status}"], timeout_s=10)
    assert "SIGCHLD" in caught.value.hint
    with (
        ignoring_children(),
        pytest.raises(HostError, match="cannot tell how 'sh' ended"),
        open_output(["sh", "-c", f"exit {status}"], timeout_s=10) as output,
    ):
        assert output.read(1) == b""


def test_status_that_another_thread_has_fetched_is_not_guessed() -> None:
    def reap(stop: threading.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0)

    stop = threading.Event()
    reaper = threading.Thread(target=reap, args=(stop,))
    reaper.start()
    try:
        # Either of the two is first; a failed program is never taken for one that did its work.
        with pytest.raises((HostError, CommandError)):
            run(["sh", "-c", "sleep 0.1; exit 7"], timeout_s=10)
    finally:
        stop.set()
        reaper.join()
