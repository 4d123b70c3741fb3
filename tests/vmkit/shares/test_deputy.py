"""The guard's deputy: wherever the guard is killed, QEMU gets each reply once, and no request of the guest waits."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.shares.device_driver import make_request
from tests.vmkit.shares.guarded import READ, Bench, expect_error, find_child, start_guard
from tests.vmkit.shares.killed_guard import FEATURES, count_unread
from tests.vsh.live import DEADLINE_S, wait_until
from vmkit.vsock import vhost_user as vu

pytestmark = pytest.mark.process

CHECKOUT = Path(__file__).resolve().parents[3]
# All places take some minutes.
KILLS_S = 1200.0


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


def test_guard_killed_before_qemu_comes_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    guard = start_guard(path)
    pid = find_child(guard._process.pid)
    server = os.pidfd_open(find_child(pid))
    os.kill(pid, signal.SIGKILL)
    # The share's process sees it.
    guard._sock.settimeout(DEADLINE_S)
    assert guard._sock.recv(1) == b""
    assert os.waitpid(guard._process.pid, 0)[1] == 0
    assert has_ended(server)
    assert list(tmp_path.iterdir()) == []
    os.close(server)
    guard.end()


def test_owner_hears_of_the_end_of_the_guard(bench: Bench) -> None:
    bench.driver.boot()
    server = os.pidfd_open(bench.find_server())
    os.kill(bench.find_guard(), signal.SIGKILL)
    bench.guard._sock.settimeout(DEADLINE_S)
    assert bench.guard._sock.recv(1) == b""
    # virtiofsd has ended before the deputy writes to its rings.
    expect_error(bench.driver.ask(make_request(READ, 1)), 1)
    assert select.select([server], [], [], 0)[0]
    os.close(server)


def test_guard_killed_while_it_answers_errors_leaves_no_request(bench: Bench) -> None:
    driver = bench.driver
    driver.boot()
    pid = bench.find_guard()
    bench.guard.end()
    expect_error(driver.ask(make_request(READ, 1)), 1)
    os.kill(pid, signal.SIGKILL)
    for number in range(300):
        expect_error(driver.ask(make_request(READ, number)), number)
    assert driver.stop() == [0, 301]


def test_message_that_the_killed_guard_had_read_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VIRTIOFSD", "answers once")
    bench = Bench(tmp_path)
    bench.driver.front.send(vu.GET_FEATURES)
    wait_until(lambda: count_unread(bench.sock) == 0, "the guard does not read")
    os.kill(bench.find_guard(), signal.SIGKILL)
    # What virtiofsd has told the guard at its start.
    assert bench.sock.recv(20, socket.MSG_WAITALL) == vu.render_reply(vu.GET_FEATURES, vu.render_u64(FEATURES))
    bench.close()
    assert os.waitpid(bench.process.pid, 0)[1] == 0


def test_guard_goes_on_without_its_deputy(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    driver = bench.driver
    pid = bench.find_guard()
    guard, server = os.pidfd_open(pid), os.pidfd_open(find_child(pid))
    os.kill(bench.process.pid, signal.SIGKILL)
    assert os.waitpid(bench.process.pid, 0)[1] == signal.SIGKILL
    driver.boot()
    head = driver.submit(make_request(READ, 1), room=4096)
    assert not select.select([server], [], [], 0)[0]
    bench.guard.end()
    expect_error(driver.wait(head), 1)
    expect_error(driver.ask(make_request(READ, 2)), 2)
    driver.close()
    assert has_ended(guard)
    for fd in (guard, server):
        os.close(fd)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_guard_is_killed_at_any_point(step: int) -> None:
    """Of a device's start. A program of its own does it: it forks, and pytest's workers have threads."""
    words = [sys.executable, "-m", "tests.vmkit.shares.killed_guard", str(step)]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=KILLS_S)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300
