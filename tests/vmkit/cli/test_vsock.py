"""`vmkit vsock`: traces and faults of a real device, driven by the command line."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from tests.vmkit.vsock.device_process import Bench, open_bench
from tests.vmkit.vsock.fake_driver import GUEST_CID, FakeDriver
from tests.vsh.live import is_listening, wait_until
from vmkit.packets.control import open_control
from vmkit.vsock.requests import ListFaults

DEADLINE_S = 60


@pytest.fixture
def bench() -> Iterator[Bench]:
    with open_bench() as bench:
        bench.driver.boot()
        yield bench


def start_trace(bench: Bench, *words: str) -> "subprocess.Popen[bytes]":
    """A trace that the device has begun: it lists itself by refusing no fifth program before that."""
    argv = [sys.executable, "-m", "vmkit", "vsock", "trace", "--control", str(bench.control_path), *words]
    before = count_lines(bench, "follows")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    bench.wait(lambda: count_lines(bench, "follows") > before, timeout_s=DEADLINE_S, what="for the trace to begin")
    return process


def count_lines(bench: Bench, word: str) -> int:
    return sum(word in line for line in bench.log().splitlines())


def test_trace_prints_lines_until_its_count(bench: Bench) -> None:
    process = start_trace(bench, "--op", "request", "--op", "rw", "--count", "2")
    program, guest = bench.open_to_guest(9001)
    program.send(b"hello")
    bench.wait_for_data(guest, b"hello")
    out, err = process.communicate(timeout=DEADLINE_S)
    first, second = out.decode().splitlines()
    assert f"to-guest request        2:{guest.host_port} > " in first
    assert ":9001 len=5 buf_alloc=" in second
    assert (process.returncode, err) == (0, b"")


def test_trace_in_json_prints_one_value_a_line(bench: Bench) -> None:
    process = start_trace(bench, "--json", "--port", "9001", "--snaplen", "2", "--op", "rw", "--count", "1")
    program, guest = bench.open_to_guest(9001)
    program.send(b"hello")
    bench.wait_for_data(guest, b"hello")
    out, _err = process.communicate(timeout=DEADLINE_S)
    value = json.loads(out)
    assert (value["op"], value["length"], value["payload"]) == ("rw", 5, b"he".hex())
    check_form("vsock-trace", value)


def test_trace_ends_with_ctrl_c_and_leaves_a_whole_file(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    process = start_trace(bench, "--pcap", str(path))
    program, guest = bench.open_to_guest(9001)
    program.send(b"hello")
    bench.wait_for_data(guest, b"hello")
    bench.wait(lambda: path.read_bytes().count(b"hello"), timeout_s=DEADLINE_S)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGINT
    assert b"packets, 0 more were dropped\nvmkit: interrupted\n" in err
    assert path.stat().st_mode & 0o777 == 0o600
    assert struct.unpack_from("<I", path.read_bytes(), 20) == (271,)


def test_trace_reports_that_the_device_ended(bench: Bench) -> None:
    process = start_trace(bench)
    bench.leave()
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (0, b"", b"vmkit: the vsock device has ended\n")


def test_fault_is_begun_listed_shown_and_cleared(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m", "--backend", "user")
    assert vmkit("vsock", "fault", "m").err == "no fault is active\n"
    assert "delay" in vmkit("vsock", "fault", "m", "delay", "--ms", "50", "--port", "9001").out
    # The only machine needs no name.
    vmkit("vsock", "fault", "refuse", "--direction", "to-host", "--times", "2")
    value = json.loads(vmkit("vsock", "fault", "m", "--json").out)
    check_form("vsock-fault", value)
    assert [(one["number"], one["kind"], one["ports"]) for one in value] == [(1, "delay", [9001]), (2, "refuse", [])]
    assert "vsock fault 1" in (shown := vmkit("status", "m").out)
    assert "delay, 50 ms, port 9001\n" in shown
    assert [one["number"] for one in json.loads(vmkit("status", "m", "--json").out)["faults"]] == [1, 2]
    vmkit("vsock", "fault", "m", "clear", "--number", "1")
    assert [one["number"] for one in json.loads(vmkit("vsock", "fault", "m", "--json").out)] == [2]
    assert vmkit("vsock", "fault", "m", "clear").status == 0
    assert vmkit("vsock", "fault", "m").err == "no fault is active\n"
    assert vmkit("vsock", "fault", "m", "reset").out == "reset: 0 connections\n"


def test_control_socket_is_its_owners_alone(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m", "--backend", "user")
    directory = Path(json.loads(vmkit("status", "m", "--json").out)["directory"])
    assert (directory / "device.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fault", "m", "delay"), "'delay' needs a delay"),
        (("fault", "m", "rate", "--ms", "5"), "'rate' needs a rate"),
        (("fault", "m", "half-close"), "hint: give --direction"),
        (("fault", "m", "nonsense"), "there is no fault 'nonsense'"),
        (("fault", "m", "clear", "--port", "5"), "clear takes no such options"),
        (("fault", "m", "reset", "--number", "5"), "--number goes with clear"),
        (("trace", "m", "--json", "--pcap", "x"), "give --json or --pcap, not both"),
        (("trace", "m", "--control", "x"), "give a machine or --control, not both"),
        (("fault", "refuse", "--ms", "5"), "'refuse' takes no delay"),
        (("fault", "--control", "/nowhere/c.sock"), "does not answer at /nowhere/c.sock"),
        (("trace", "nobody"), "no machine named 'nobody' is running"),
    ],
)
def test_wrong_use_is_explained(vmkit: Vmkit, words: tuple[str, ...], text: str) -> None:
    done = vmkit("vsock", *words)
    assert done.status != 0
    assert text in done.err


def test_file_that_cannot_be_written_is_named(bench: Bench, vmkit: Vmkit) -> None:
    done = vmkit("vsock", "trace", "--control", str(bench.control_path), "--pcap", f"{os.devnull}/x")
    assert done.status == 1
    assert "cannot write /dev/null/x: Not a directory" in done.err


def test_device_for_any_vmm_serves_a_front_end_and_ends_with_it() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vsock-"))
    front, control = folder / "front", folder / "control"
    argv = [sys.executable, "-m", "vmkit", "device", "vsock", "--socket", str(front), "--cid", str(GUEST_CID)]
    process = subprocess.Popen([*argv, "--control", str(control)], stderr=subprocess.PIPE)
    wait_until(lambda: is_listening(front) or process.poll() is not None, "the device listens", DEADLINE_S)
    vmm = socket.socket(socket.AF_UNIX)
    vmm.connect(str(front))
    driver = FakeDriver(vmm)
    driver.boot()
    driver.listen(5000)
    with socket.socket(socket.AF_UNIX) as program, open_control(control) as asked:
        program.connect(f"{front}.host")
        program.sendall(b"CONNECT 5000\nhello")
        guest = driver.accept(5000)
        driver.wait(lambda: guest.data == b"hello")
        assert program.recv(100).startswith(b"OK ")
        assert asked.ask(ListFaults()) == []
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    driver.close()
    vmm.close()
    _out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    assert list(folder.iterdir()) == []
    folder.rmdir()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--socket", "a"), "Missing option '--cid'"),
        (("--cid", "5"), "Missing option '--socket'"),
        (("--socket", "a", "--cid", "2"), "'--cid': must be between 3 and 4294967294, not 2"),
    ],
)
def test_device_with_wrong_options_is_explained(vmkit: Vmkit, words: tuple[str, ...], text: str) -> None:
    done = vmkit("device", "vsock", *words)
    assert (done.status, text in done.err) == (64, True), done.err
