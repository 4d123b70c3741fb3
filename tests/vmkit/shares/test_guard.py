"""virtiofsd's guard: at its end no request of the guest waits, whether it had begun or comes later."""

import contextlib
import os
import select
import signal
import socket
import struct
from pathlib import Path

import pytest

from tests.vmkit.shares.device_driver import HIPRIO, REQUESTS, make_request
from tests.vmkit.shares.guarded import FAKE, FORGET, READ, Bench, expect_error, start_guard
from tests.vsh.live import DEADLINE_S
from vmkit.shares import relay as relaying
from vmkit.shares.guard import LISTENER_MARK, WantedServer, _has_ended
from vmkit.shares.over_virtiofs import Guard
from vmkit.shares.relay import DeviceRelay
from vmkit.vsock import vhost_user as vu
from vsh.errors import ExecError

pytestmark = pytest.mark.process


@pytest.mark.parametrize("how", ["killed", "asked", "guard killed"])
@pytest.mark.parametrize("is_indirect", [False, True], ids=["direct", "indirect"])
def test_requests_in_flight_and_later_ones_are_answered(bench: Bench, how: str, *, is_indirect: bool) -> None:
    driver = bench.driver
    driver.boot()
    table = driver.allocate(64) if is_indirect else None
    heads = [driver.submit(make_request(READ, number), room=4096, table=table) for number in range(1 if table else 3)]
    forgotten = driver.submit(make_request(FORGET, 9, bytes(8)), ring=HIPRIO, room=0)
    if how == "killed":
        os.kill(bench.find_server(), signal.SIGKILL)
    elif how == "guard killed":
        os.kill(bench.find_guard(), signal.SIGKILL)
    else:
        bench.guard.end()
    for number, head in enumerate(heads):
        expect_error(driver.wait(head), number)
    # It has no answer, and must not wait either: the guest counts it.
    assert driver.wait(forgotten, ring=HIPRIO) == b""
    for number in range(300):
        expect_error(driver.ask(make_request(READ, number)), number)


def test_kick_that_came_too_early_is_repeated(bench: Bench) -> None:
    """virtiofsd has taken it, and not looked at the ring. Without another one the guest's first request would wait."""
    driver = bench.driver
    ring = driver.rings[1]
    os.eventfd_write(ring.kick_fd, 1)
    driver.boot()
    assert select.select([ring.call_fd], [], [], DEADLINE_S)[0]


def test_owner_hears_of_the_end_of_virtiofsd(bench: Bench) -> None:
    bench.driver.boot()
    os.kill(bench.find_server(), signal.SIGKILL)
    bench.guard._sock.settimeout(DEADLINE_S)
    assert b"ended" in bench.guard._sock.recv(4096)


def test_answer_whose_interrupt_never_came_has_one(bench: Bench) -> None:
    """virtiofsd may end between both. The guest would wait for an answer that it has."""
    driver = bench.driver
    driver.boot()
    # The answer, as virtiofsd writes it.
    ring = driver.rings[REQUESTS]
    head = driver.submit(make_request(READ, 7), room=4096)
    ring.ram.write(ring.used + 4, struct.pack("<II", head, 0))
    ring.ram.write(ring.used + 2, struct.pack("<H", 1))
    driver.front.ask_u64(vu.GET_FEATURES)
    ring.drain_call()
    os.kill(bench.find_server(), signal.SIGKILL)
    assert select.select([ring.call_fd], [], [], DEADLINE_S)[0]


def test_device_can_begin_anew_after_the_end(bench: Bench) -> None:
    """A guest may unbind the driver, and bind it again, before the device is out."""
    driver = bench.driver
    driver.boot()
    bench.guard.end()
    expect_error(driver.ask(make_request(READ, 1)), 1)
    assert driver.stop() == [0, 1]
    for ring in driver.rings:
        ring.reset()
    driver.start()
    expect_error(driver.ask(make_request(READ, 2)), 2)


def test_late_reply_of_virtiofsd_is_not_that_of_another_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "REPLY_DEADLINE_S", 0.05)
    ours, server = socket.socketpair()
    qemu, theirs = socket.socketpair()
    relay = DeviceRelay(ours)
    try:
        relay.connect(theirs)
        qemu.settimeout(DEADLINE_S)
        server.settimeout(DEADLINE_S)
        qemu.sendall(vu.HEADER.pack(vu.GET_FEATURES, 1, 0))
        relay.work()
        assert qemu.recv(20) == vu.render_reply(vu.GET_FEATURES, bytes(8))
        assert server.recv(12) == vu.HEADER.pack(vu.GET_FEATURES, 1, 0)
        with contextlib.suppress(BrokenPipeError):
            server.sendall(vu.render_reply(vu.GET_FEATURES, vu.render_u64(1 << 30)))
        qemu.sendall(vu.HEADER.pack(vu.GET_QUEUE_NUM, 1, 0))
        relay.work()
        assert qemu.recv(20) == vu.render_reply(vu.GET_QUEUE_NUM, bytes(8))
        # The guard sees the end of the connection, and so does virtiofsd.
        assert _has_ended(ours)
        assert server.recv(1) == b""
    finally:
        relay.close()
        for sock in (server, qemu):
            sock.close()


@pytest.mark.parametrize("fault", ["head", "loop", "jump", "outside", "table"])
def test_ring_of_a_hostile_guest_ends_nothing_but_itself(bench: Bench, fault: str) -> None:
    driver = bench.driver
    driver.boot()
    bench.guard.end()
    ring = driver.rings[1]
    match fault:
        case "head":
            ring.offer(ring.size)
        case "jump":
            ring.set_avail_idx(ring.size + 1)
        case "loop":
            ring.write_desc(0, driver.allocate(64), 64, 1, 0)
            ring.offer(0)
        case "outside":
            ring.write_desc(0, 1 << 40, 64, 0, 0)
            ring.offer(0)
        case "table":
            ring.write_desc(0, driver.allocate(64), 24, 4, 0)
            ring.offer(0)
    ring.kick(is_forced=True)
    # The other ring goes on.
    forgotten = driver.submit(make_request(FORGET, 9, bytes(8)), ring=HIPRIO, room=0)
    assert driver.wait(forgotten, ring=HIPRIO) == b""
    # The guest resets the device.
    driver.stop()
    for one in driver.rings:
        one.reset()
    driver.start()
    expect_error(driver.ask(make_request(READ, 2)), 2)


def test_share_that_is_killed_before_qemu_comes_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    guard = start_guard(path)
    assert path.exists()
    guard._sock.close()
    assert os.waitpid(guard._process.pid, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_virtiofsd_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VIRTIOFSD", "ends")
    wanted = WantedServer((str(FAKE), "--fd", LISTENER_MARK), str(tmp_path / "qemu"), os.geteuid(), os.getegid())
    with pytest.raises(ExecError, match=r"Error creating sandbox: Fork\(EPERM\)"):
        Guard(wanted)
    wanted = WantedServer(("/nonexistent/virtiofsd",), str(tmp_path / "other"), os.geteuid(), os.getegid())
    with pytest.raises(ExecError, match="virtiofsd cannot be started"):
        Guard(wanted)
