"""`vmkit vsock` on a real guest, and `vmkit device vsock` under a QEMU that was started by hand."""

import contextlib
import hashlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import Run, run_program
from tests.guest.rival_device import fetch_program
from tests.vsh.live import is_listening

TSHARK = shutil.which("tshark")
DEADLINE_S = 240
VSHD_PORT = 9001
READY_PORT = 7777


@contextlib.contextmanager
def running(*argv: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is gone afterwards."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(is_done: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_done():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_trace_has_a_session_and_wireshark_reads_it(ready: str, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    path = tmp_path / "session.pcap"
    argv = [sys.executable, "-m", "vmkit", "vsock", "trace", ready, "--port", str(VSHD_PORT), "--pcap", str(path)]
    with running(*argv) as process:
        wait_for(lambda: path.exists() and path.stat().st_size >= 24)
        assert vsh("--vm_name", ready, "--", "echo", "seen-by-the-trace").stdout == b"seen-by-the-trace\n"
        wait_for(lambda: b"seen-by-the-trace" in path.read_bytes())
        process.terminate()
        process.wait(DEADLINE_S)
    if TSHARK is not None:
        words = ["-T", "fields", "-e", "vsock.src_port", "-e", "vsock.dst_port", "-e", "vsock.virtio.op"]
        done = subprocess.run([TSHARK, "-r", str(path), *words], capture_output=True, text=True, check=True)
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        assert all(str(VSHD_PORT) in row[:2] for row in rows)
        assert {"1", "2", "5"} <= {row[2] for row in rows}


def test_refused_connections_are_counted_and_the_next_one_works(ready: str, vmkit: Run, vsh: Run) -> None:
    vmkit("vsock", "fault", ready, "refuse", "--port", str(VSHD_PORT), "--direction", "to-guest")
    try:
        assert vsh("--vm_name", ready, "--connect_timeout=1", "--", "true").returncode != 0
        (fault,) = json.loads(vmkit("vsock", "fault", ready, "--json").stdout)
        assert fault["hits"] >= 1
    finally:
        vmkit("vsock", "fault", ready, "clear")
    assert vsh("--vm_name", ready, "--", "true").returncode == 0


def test_delay_slows_a_session_down(ready: str, vmkit: Run, vsh: Run) -> None:
    vmkit("vsock", "fault", ready, "delay", "--ms", "700", "--port", str(VSHD_PORT))
    try:
        began_s = time.monotonic()
        assert vsh("--vm_name", ready, "--", "echo", "late").stdout == b"late\n"
        assert time.monotonic() - began_s >= 0.7
    finally:
        vmkit("vsock", "fault", ready, "clear")


def test_reset_after_bytes_breaks_a_session(ready: str, vmkit: Run, vsh: Run) -> None:
    words = ("reset", "--port", str(VSHD_PORT), "--direction", "to-host", "--after", "100000", "--times", "1")
    vmkit("vsock", "fault", ready, *words)
    done = vsh("--vm_name", ready, "--", "head", "-c", "1000000", "/dev/zero")
    assert done.returncode != 0
    assert 0 < len(done.stdout) < 100_000
    assert len(vsh("--vm_name", ready, "--", "head", "-c", "1000000", "/dev/zero").stdout) == 1_000_000


def test_killed_device_is_replaced(ready: str, vmkit: Run, vsh: Run) -> None:
    assert vmkit("vsock", "fault", ready, "kill").returncode == 0
    wait_for(lambda: b"device-replaced" in vmkit("logs", ready, "--kind", "events").stdout)
    events = vmkit("logs", ready, "--kind", "events").stdout
    assert b"exit status 75" in events or b"status 75" in events
    assert vsh("--vm_name", ready, "--", "true").returncode == 0
    assert vmkit("vsock", "fault", ready).stderr == b"no fault is active\n"


# A device for any VMM


@pytest.fixture
def folder() -> Iterator[Path]:
    """Names of UNIX sockets are short."""
    path = Path(tempfile.mkdtemp(prefix="vsock-"))
    yield path
    shutil.rmtree(path)


def render_qemu(folder: Path, front: Path) -> list[str]:
    """QEMU's command for tiny as a person would write it: vmkit's, by hand, and the device of ours."""
    text = run_program("vmkit", "up", "tiny", "--accel", "tcg", "--dry-run").stdout.decode()
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(("qemu-system", "/usr/bin/qemu-system"))]
    words = shlex.split(line)
    words[words.index("stdio,id=console,mux=on,signal=off")] = f"file,id=console,path={folder / 'console'}"
    words += ["-chardev", f"socket,id=vsock,path={front}"]
    return [*words, "-device", "vhost-user-vsock-pci,chardev=vsock,bus=vsock-port"]


def test_device_serves_a_qemu_that_was_started_by_hand(built: None, folder: Path) -> None:
    front, uds, control = folder / "front", folder / "v", folder / "control"
    ready = socket.socket(socket.AF_UNIX)
    ready.bind(f"{uds}_{READY_PORT}")
    ready.listen()
    ready.settimeout(DEADLINE_S)
    words = ("--socket", str(front), "--cid", "77", "--uds-path", str(uds), "--control", str(control))
    with ready, running(sys.executable, "-m", "vmkit", "device", "vsock", *words) as device:
        wait_for(lambda: is_listening(front))
        with running(*render_qemu(folder, front)) as qemu:
            # From the guest to a program of the host.
            connection, _address = ready.accept()
            with connection, connection.makefile("rb") as file:
                assert b"READY=1" in file.read()
            # From a program of the host to the guest, in Firecracker's words.
            with socket.socket(socket.AF_UNIX) as program:
                program.connect(str(uds))
                program.sendall(b"CONNECT %d\n" % VSHD_PORT)
                assert program.recv(100).startswith(b"OK ")
            done = run_program("vsh", f"--uds={uds}", "--", "cat", "/proc/sys/kernel/osrelease")
            assert done.returncode == 0, done.stderr.decode()
            check_socat(uds)
            faults = run_program("vmkit", "vsock", "fault", "--control", str(control), "refuse", "--json")
            assert json.loads(faults.stdout)[0]["kind"] == "refuse"
            assert run_program("vsh", f"--uds={uds}", "--connect_timeout=1", "--", "true").returncode != 0
            qemu.terminate()
            qemu.wait(DEADLINE_S)
        assert device.wait(DEADLINE_S) == 0
        assert not front.exists() and not uds.exists() and not control.exists()


@pytest.mark.slow  # It fetches the index of another release of Debian.
def test_vsh_works_with_the_device_of_rust_vmm(built: None, folder: Path, tmp_path: Path) -> None:
    """vhost-device-vsock in the place of our device. It loses large writes of the guest, so those are small."""
    front, uds = folder / "front", folder / "v"
    ready = socket.socket(socket.AF_UNIX)
    ready.bind(f"{uds}_{READY_PORT}")
    ready.listen()
    ready.settimeout(DEADLINE_S)
    words = ("--socket", str(front), "--guest-cid", "77", "--uds-path", str(uds))
    with ready, running(str(fetch_program(tmp_path)), *words):
        wait_for(lambda: is_listening(front))
        with running(*render_qemu(folder, front)):
            connection, _address = ready.accept()
            with connection, connection.makefile("rb") as file:
                assert b"READY=1" in file.read()
            where = ("vsh", f"--uds={uds}", "--")
            done = run_program(*where, "sh", "-c", "cat; echo its error >&2; exit 3", stdin=b"its input\n")
            assert (done.returncode, done.stdout, done.stderr) == (3, b"its input\n", b"its error\n")
            many = bytes(range(256)) * (8 << 10)
            counted = run_program(*where, "sha256sum", stdin=many).stdout
            assert counted.split()[0].decode() == hashlib.sha256(many).hexdigest()


def check_socat(uds: Path) -> None:
    """socat as the program of the host, where it is installed."""
    if shutil.which("socat"):
        argv = ["socat", "-t", "5", "-", f"UNIX-CONNECT:{uds}"]
        done = subprocess.run(argv, input=b"CONNECT 9001\n", capture_output=True, timeout=DEADLINE_S, check=False)
        assert done.stdout.startswith(b"OK "), done.stderr
