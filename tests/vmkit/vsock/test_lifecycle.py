"""The device process from its first to its last moment: starts, waits, pauses, resets, and the end of its front-end."""

import array
import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import ROOT, Bench, open_bench
from tests.vmkit.vsock.fake_driver import WAIT_S
from vmkit.vsock import packet as pk
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.muxer import FIRST_HOST_PORT, LAST_HOST_PORT


def test_connect_before_the_driver_runs_is_held(cold_bench: Bench) -> None:
    bench = cold_bench
    early = bench.connect()
    early.send(b"CONNECT 9001\nfirst words")
    gone = bench.connect()
    gone.send(b"CONNECT 9001\n")
    bench.driver.listen(9001)
    bench.driver.connect()
    gone.close()
    bench.settle()
    assert not early.data and not early.is_ended
    bench.driver.start()
    assert early.line().startswith(b"OK ")
    guest = bench.driver.accept(9001)
    bench.wait(lambda: guest.data == b"first words")
    assert len(bench.driver.sockets) == 1


def test_silent_host_program_loses_nothing_and_blocks_nobody(bench: Bench) -> None:
    silent = bench.connect()
    program, guest = bench.open_to_guest(9001)
    program.send(b"x")
    bench.wait(lambda: guest.data == b"x")
    assert not silent.is_ended


def test_host_program_that_gives_up_before_the_answer_is_withdrawn(bench: Bench) -> None:
    bench.driver.is_stack_on = False
    program = bench.connect()
    program.send(b"CONNECT 9001\n")
    bench.wait(lambda: bench.driver.received)
    program.close()
    bench.wait(lambda: bench.driver.received[-1].op == pk.OP_RST)
    bench.wait(lambda: bench.open_count() == 0)


def test_pause_keeps_connections(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.send(b"before")
    bench.wait(lambda: guest.data == b"before")
    bases = bench.driver.stop()
    program.send(b" during")
    late = bench.connect()
    late.send(b"CONNECT 9001\n")
    guest.send(b"not lost")
    bench.driver.start(bases)
    bench.wait(lambda: guest.data == b"before during" and program.data == b"not lost")
    assert late.line().startswith(b"OK ")
    assert "the guest goes on" in bench.log()


def test_reset_closes_connections_and_a_new_driver_starts_clean(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    slow, slow_guest = bench.open_to_guest(9002)
    slow.is_reading = False
    slow_guest.send(bytes(200_000))
    guest.send(b"last words")
    bench.settle()
    bench.driver.reboot()
    bench.wait(lambda: program.is_ended)
    assert program.data == b"last words"
    slow.is_reading = True
    bench.wait(lambda: slow.is_ended)
    assert len(slow.data) == 200_000
    again, again_guest = bench.open_to_guest(9001)
    again.send(b"hello")
    bench.wait(lambda: again_guest.data == b"hello")
    bench.wait(lambda: bench.open_count() == 1)


def test_unanswered_connect_is_asked_again_after_a_reset(bench: Bench) -> None:
    bench.driver.is_stack_on = False
    program = bench.connect()
    program.send(b"CONNECT 9001\nhello")
    bench.wait(lambda: bench.driver.received)
    bench.driver.is_stack_on = True
    bench.driver.reboot()
    bench.driver.listen(9001)
    guest = bench.driver.accept(9001)
    bench.wait(lambda: guest.data == b"hello")
    assert program.line().startswith(b"OK ")


def test_reset_device_message_closes_connections_at_once(bench: Bench) -> None:
    program, _guest = bench.open_to_guest(9001)
    bench.driver.stop()
    bench.driver.front.send(vu.RESET_DEVICE)
    bench.driver.sync()
    program.read_to_end()


def test_hangup_signal_closes_connections_of_a_stopped_device_only(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    bench.process.send_signal(signal.SIGHUP)
    bench.settle()
    program.send(b"x")
    bench.wait(lambda: guest.data == b"x")
    bench.driver.stop()
    bench.process.send_signal(signal.SIGHUP)
    program.read_to_end()


def test_new_memory_table_under_running_rings(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.send(b"one")
    bench.wait(lambda: guest.data == b"one")
    table, fds = bench.driver.memory_table(), (bench.driver.ram.fd, bench.driver.ram.fd)
    assert bench.driver.front.ask_u64(vu.SET_MEM_TABLE, table, fds, flags=9) == 0
    program.send(b"two")
    guest.send(b"three")
    bench.wait(lambda: guest.data == b"onetwo" and program.data == b"three")


def test_refused_memory_table_is_answered_and_survived(cold_bench: Bench) -> None:
    driver = cold_bench.driver
    driver.connect()
    for table in (
        struct.pack("<II", 0, 0),
        struct.pack("<IIQQQQ", 1, 0, 0, fd.RAM_BYTES + 1, 0, 0),
        struct.pack("<IIQQQQQQQQ", 2, 0, 0, 8192, 0, 0, 4096, 8192, 0, 0),
    ):
        count = struct.unpack_from("<I", table)[0]
        assert driver.front.ask_u64(vu.SET_MEM_TABLE, table, (driver.ram.fd,) * count, flags=9) == 1
    driver.start()
    cold_bench.open_to_guest(9001)


def test_unknown_message_is_refused_where_an_answer_is_wanted(cold_bench: Bench) -> None:
    front = cold_bench.driver.front
    assert front.ask_u64(200, b"", flags=9) == 1
    front.send(201)
    cold_bench.driver.boot()


@pytest.mark.parametrize(
    "data",
    [
        vu.HEADER.pack(1, 2, 0),
        vu.HEADER.pack(1, 1, 10**6),
        vu.HEADER.pack(1, 5, 0),
    ],
)
def test_broken_front_end_ends_the_device_with_an_error(cold_bench: Bench, data: bytes) -> None:
    program = cold_bench.connect()
    program.send(b"CONNECT 1\n")
    cold_bench.front_socket.sendall(data)
    assert cold_bench.process.wait(WAIT_S) == 1
    assert "vhost-user:" in cold_bench.log()
    cold_bench.process.returncode = 0  # expected here


def test_front_end_that_vanishes_ends_the_device_with_zero(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.send(b"bye")
    bench.settle()
    assert bench.leave() == 0
    program.read_to_end()
    assert program.data == b"bye"


def test_front_end_that_vanishes_leaves_time_for_the_last_bytes(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    # More than a UNIX socket holds, so that the device itself keeps some.
    data = os.urandom(1_000_000)
    guest.send(data)
    bench.wait(lambda: guest.credit == 0)
    sent = 1_000_000 - len(guest.outbox)
    bench.front_socket.close()
    time.sleep(0.05)
    program.is_reading = True
    program.read_to_end()
    assert program.data == data[:sent]
    assert bench.process.wait(WAIT_S) == 0


def test_packets_in_the_ring_are_delivered_although_the_front_end_is_gone(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    bench.settle()
    os.kill(bench.process.pid, signal.SIGSTOP)
    guest.send(b"written just before the power went")
    bench.front_socket.close()
    os.kill(bench.process.pid, signal.SIGCONT)
    program.read_to_end()
    assert program.data == b"written just before the power went"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_device(bench: Bench, number: int) -> None:
    program, _guest = bench.open_to_guest(9001)
    bench.process.send_signal(number)
    assert bench.process.wait(WAIT_S) == 0
    program.read_to_end()


def test_descriptors_passed_by_a_host_program_are_dropped_and_its_bytes_are_not(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    program.sock.sendmsg([b"with"], rights)
    program.sock.sendall(b" and without")
    bench.wait(lambda: guest.data == b"with and without")


def test_out_of_band_bytes_of_a_host_program_stall_nothing(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    os.kill(bench.process.pid, signal.SIGSTOP)
    program.sock.sendall(b"before")
    try:
        program.sock.send(b"!", socket.MSG_OOB)
    except OSError:
        pytest.skip("this kernel has no out-of-band bytes on UNIX sockets")
    finally:
        os.kill(bench.process.pid, signal.SIGCONT)
    program.sock.sendall(b"after")
    bench.wait(lambda: guest.data.endswith(b"after"))
    assert guest.data.startswith(b"before")


def count_fds(bench: Bench) -> int:
    return len(list(Path(f"/proc/{bench.process.pid}/fd").iterdir()))


def test_no_descriptor_leaks_over_connections_and_resets(bench: Bench) -> None:
    bench.settle()
    before = count_fds(bench)
    for _ in range(3):
        for _ in range(5):
            program, guest = bench.open_to_guest(9001)
            program.close()
            bench.wait_for_reset(guest)
        bench.driver.reboot()
    bench.settle()
    assert count_fds(bench) == before


def test_idle_device_is_small_and_sleeps(bench: Bench) -> None:
    bench.settle()
    status = Path(f"/proc/{bench.process.pid}/status").read_text()
    rss_kib = int(status.split("VmRSS:")[1].split()[0])
    assert rss_kib < 20 * 1024


# Started by hand.


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vsock-") as name:
        yield Path(name)


def run_device(*options: str, **keywords: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vmkit.vsock", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=WAIT_S, check=False, **keywords)


def test_device_by_hand_makes_and_removes_its_sockets(directory: Path) -> None:
    front_path, uds_path = directory / "vhost", directory / "v"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(uds_path))
    stale.close()
    command = [sys.executable, "-m", "vmkit.vsock", "--guest-cid", "3"]
    command += ["--socket", str(front_path), "--uds-path", str(uds_path)]
    # The front-end's end is closed first, whatever happens: the device lives as long as it does.
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process, socket.socket(socket.AF_UNIX) as front:
        deadline = time.monotonic() + WAIT_S
        while front.connect_ex(str(front_path)) != 0:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        assert stat.S_IMODE(uds_path.stat().st_mode) == 0o600
        assert stat.S_IMODE(front_path.stat().st_mode) == 0o600
        driver = fd.FakeDriver(front)
        driver.boot()
        program = socket.socket(socket.AF_UNIX)
        program.connect(str(uds_path))
        program.sendall(b"CONNECT 1\n")
        driver.listen(1)
        driver.accept(1)
        driver.wait(lambda: True)
        assert program.recv(3) == b"OK "
        program.close()
        driver.close()
        assert process.wait(WAIT_S) == 0
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("does_listen", [True, False])
def test_device_refuses_a_socket_in_use(directory: Path, *, does_listen: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(directory / "v"))
        if does_listen:
            other.listen()
        done = run_device("--guest-cid", "3", "--socket", str(directory / "f"), "--uds-path", str(directory / "v"))
        assert done.returncode == 1
        assert "in use" in done.stderr
        assert sorted(path.name for path in directory.iterdir()) == ["v"]


def test_device_refuses_a_file_that_is_no_socket(directory: Path) -> None:
    (directory / "v").write_text("precious")
    done = run_device("--guest-cid", "3", "--socket", str(directory / "f"), "--uds-path", str(directory / "v"))
    assert done.returncode == 1
    assert "not a socket" in done.stderr
    assert (directory / "v").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--guest-cid", "2", "--socket", "a", "--uds-path", "b"], 64, "from 3"),
        (["--guest-cid", "4294967295", "--socket", "a", "--uds-path", "b"], 64, "to 4294967294"),
        (["--guest-cid", "3", "--uds-path", "b"], 64, "give either"),
        (["--guest-cid", "3", "--uds-path", "b", "--listen-fd", "0"], 64, "give either"),
        (["--guest-cid", "3", "--socket", "a", "--uds-path", "b" * 100], 1, "longer than"),
        (["--guest-cid", "3", "--uds-path", "b", "--listen-fd", "0", "--vhost-user-fd", "0"], 1, "not a socket"),
        (["--guest-cid", "3", "--socket", "/nonexistent/a", "--uds-path", "b"], 1, "cannot listen"),
    ],
)
def test_device_explains_a_bad_command_line(options: list[str], status: int, text: str) -> None:
    done = run_device(*options)
    assert done.returncode == status
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_device_says_when_there_is_no_room_for_connections(directory: Path) -> None:
    limits = 'ulimit -n 64; exec "$0" "$@"'
    command = ["sh", "-c", limits, sys.executable, "-m", "vmkit.vsock", "--guest-cid", "3"]
    command += ["--socket", str(directory / "f"), "--uds-path", str(directory / "v")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert "open files" in done.stderr


def test_host_without_descriptors_pauses_the_door_and_refuses_the_guest(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    listener = bench.listen(7777)
    pid = bench.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, hard))
    waiting = bench.connect()
    waiting.send(b"CONNECT 9001\n")
    refused = bench.driver.dial(7777)
    bench.wait(lambda: refused.is_reset)
    bench.wait_log("cannot accept a host program")
    guest.send(b"who is inside goes on")
    bench.wait(lambda: program.data == b"who is inside goes on")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert waiting.line().startswith(b"OK ")
    again = bench.driver.dial(7777)
    bench.accept(listener)
    bench.wait(lambda: again.is_open)


def test_log_that_nobody_reads_does_not_stop_the_device(directory: Path) -> None:
    front, back = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "v"))
    listener.listen()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [sys.executable, "-m", "vmkit.vsock", "--guest-cid", "3", "--uds-path", str(directory / "v")]
    command += ["--vhost-user-fd", str(back.fileno()), "--listen-fd", str(listener.fileno())]
    fds = (back.fileno(), listener.fileno())
    with subprocess.Popen(command, cwd=ROOT, stderr=writer, pass_fds=fds) as process:
        back.close()
        listener.close()
        driver = fd.FakeDriver(front)
        driver.boot()
        driver.send_packet(driver.header(1, 2, pk.OP_REQUEST, src_cid=9))
        driver.sync()
        driver.close()
        assert process.wait(WAIT_S) == 0
    os.close(reader)
    os.close(writer)


def test_each_device_begins_at_another_host_port() -> None:
    """A guest that was saved, or whose device was replaced, may still close a connection of the device before."""
    ports = set()
    for _ in range(2):
        with open_bench() as bench:
            bench.driver.boot()
            bench.driver.listening.setdefault(9001, [])
            program = bench.connect()
            program.send(b"CONNECT 9001\n")
            ports.add(int(program.line().split()[1]))
    assert len(ports) == 2
    assert all(FIRST_HOST_PORT <= port <= LAST_HOST_PORT for port in ports)
