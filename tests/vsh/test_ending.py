"""A connection that is lost since its machine ended: each way to use a guest names that end."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd, ended, wait_until
from vmkit.copy.copying import copy
from vmkit.copy.endpoints import Endpoint
from vmkit.copy.sides import SftpPeer
from vmkit.errors import MachineError
from vmkit.machine.sftp import connect_sftp
from vsh.address import Address
from vsh.client import Client
from vsh.errors import ConnectionLost, Unreachable
from vsh.registry import Entry

BRIEF = "the guest's kernel panicked: a reason"
PID = 4_000_000


@pytest.fixture
def address(vshd: Vshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """The address of a machine `m` of the registry, whose vshd is `vshd`; its monitor is played here."""
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    directory = tmp_path / "machines" / "m"
    directory.mkdir(parents=True, mode=0o700)
    record = {"name": "m", "cid": 3, "state": "ready", "pid": PID, "vsock": str(vshd.path)}
    (directory / "machine.json").write_text(json.dumps(record))
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield make_address(vshd, directory, record)


def make_address(vshd: Vshd, directory: Path, record: dict[str, object]) -> Address:
    address = Address.unix(str(vshd.path))
    address.name = "machine 'm'"
    address.entry = Entry(str(directory), record)
    return address


def play_monitor(address: Address, ending: dict[str, object]) -> threading.Thread:
    """A monitor that leaves its machine's end, and tells it to the first who connects."""
    listener = socket.socket(socket.AF_UNIX)
    assert address.entry
    listener.bind(f"{address.entry.directory}/monitor.sock")
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as asker:
            folder = Path(os.environ["VMKIT_RUNTIME_DIR"]) / "ends"
            folder.mkdir()
            (folder / "m.json").write_text(json.dumps({"name": "m", "pid": PID, **ending}))
            asker.sendall(json.dumps({"end": "panic", "brief": BRIEF, "expected": False}).encode() + b"\n")

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def kill_sessions(vshd: Vshd, started: Path | None = None) -> None:
    """As a guest that panics: the connection is gone, and no word of an exit has come. started: a file to wait for."""
    wait_until(lambda: started is None or started.exists(), "the command runs")
    for pid in vshd.children():
        os.kill(pid, signal.SIGKILL)


def test_lost_session_of_popen_names_the_machines_end(vshd: Vshd, address: Address) -> None:
    monitor = play_monitor(address, {"brief": BRIEF, "expected": False, "details": "the last lines"})
    with pytest.raises(ConnectionLost) as caught, Client(address).popen(["sleep", "100"]):
        kill_sessions(vshd)
    monitor.join(30)
    error = caught.value
    assert str(error) == error.brief == f"lost the connection to machine 'm': {BRIEF}"
    assert (error.details, error.hint, error.status) == ("the last lines", "see its logs: vmkit logs m", 123)


def test_lost_session_of_run_names_the_machines_end(vshd: Vshd, address: Address, tmp_path: Path) -> None:
    monitor = play_monitor(address, {"brief": "the guest powered off", "expected": True})
    killer = threading.Thread(target=kill_sessions, args=(vshd, tmp_path / "started"))
    killer.start()
    # The command may run before the server has said so: then there was no session yet.
    with pytest.raises((ConnectionLost, Unreachable)) as caught:
        Client(address).run(["sh", "-c", f": > {tmp_path / 'started'}; sleep 100"])
    killer.join(30)
    monitor.join(30)
    assert caught.value.brief.startswith(("lost the connection to machine 'm': ", "machine 'm' has ended: "))
    assert caught.value.brief.endswith(": the guest powered off")
    assert (caught.value.details, caught.value.hint) == ("", "")


def test_machine_that_ends_before_its_vshd_answers_has_the_status_of_a_lost_connection(
    address: Address, tmp_path: Path
) -> None:
    """A command that panics its guest at once: a script must not take the end for the command's own status 1."""
    monitor = play_monitor(address, {"brief": BRIEF, "expected": False, "details": "the last lines"})
    address.path = str(tmp_path / "guest")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address.path)
        listener.listen()

        def end_at_the_request() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)

        guest = threading.Thread(target=end_at_the_request)
        guest.start()
        with pytest.raises(Unreachable) as caught:
            Client(address).run(["sh", "-c", "echo c > /proc/sysrq-trigger"])
        guest.join(30)
    monitor.join(30)
    assert caught.value.brief == f"lost the connection to machine 'm': {BRIEF}"
    assert (caught.value.details, caught.value.status) == ("the last lines", 123)


def test_lost_session_of_a_machine_that_goes_on_is_told_as_before(vshd: Vshd, address: Address) -> None:
    """Nothing listens where its monitor would: there is nothing to wait for."""
    with pytest.raises(ConnectionLost) as caught, Client(address).popen(["sleep", "100"]):
        kill_sessions(vshd)
    assert caught.value.brief == "lost the connection to machine 'm': the connection ended"


def test_lost_file_names_the_machines_end(vshd: Vshd, address: Address, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    monitor = play_monitor(address, {"brief": BRIEF, "expected": False, "details": "the last lines"})
    with pytest.raises(ConnectionLost) as caught, Client(address).open(str(tmp_path / "file")) as file:
        kill_sessions(vshd)
        while file.read(1 << 16):
            pass
    monitor.join(30)
    assert str(caught.value) == caught.value.brief == f"lost the connection to machine 'm': {BRIEF}"
    assert caught.value.details == "the last lines"


def test_lost_copy_names_the_machines_end(vshd: Vshd, address: Address, tmp_path: Path) -> None:
    monitor = play_monitor(address, {"brief": BRIEF, "expected": False, "details": "the last lines"})
    machine = address.entry
    assert machine

    def connect(_name: str) -> SftpPeer:
        peer = connect_sftp(machine, "")
        kill_sessions(vshd)
        return peer

    with pytest.raises(MachineError) as caught:
        copy([Endpoint("m", b"/x")], Endpoint(None, os.fsencode(tmp_path / "x")), connect, into=False)
    monitor.join(30)
    assert caught.value.brief == f"machine 'm' has ended: {BRIEF}"
    assert caught.value.details == "the last lines"


def test_lost_subsystem_names_the_machines_end(vshd: Vshd, address: Address) -> None:
    monitor = play_monitor(address, {"brief": BRIEF, "expected": False, "details": "the last lines"})
    argv = [sys.executable, "-m", "vsh", "--vm_name=m", "--subsystem=sftp"]
    environment = {**ENVIRONMENT, "VMKIT_RUNTIME_DIR": os.environ["VMKIT_RUNTIME_DIR"]}
    pipe = subprocess.PIPE
    with ended(subprocess.Popen(argv, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)) as client:
        assert client.stdin
        assert client.stdout
        assert client.stderr
        client.stdin.write(bytes.fromhex("00000005 01 00000003"))
        client.stdin.flush()
        assert client.stdout.read(1)
        kill_sessions(vshd)
        errors = client.stderr.read()
        assert client.wait(DEADLINE_S) == 123
    monitor.join(30)
    assert f"vsh: lost the connection to machine 'm': {BRIEF}\n  the last lines\n".encode() in errors
