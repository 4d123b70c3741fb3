"""Machines that start from a snapshot: each is one of its own, with the time, and nothing of a snapshot is served."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmkit as vmkit_package
from tests.guest.clock import CLOCK_LIMIT_S, read_clock_error_s
from tests.guest.conftest import BIN, DEADLINE_S, Run
from tests.guest.test_dmesg import KERNELS, write_recipe
from tests.guest.test_forward import port_of, running
from tests.vmkit.machine.hurry import hurry_builder
from tests.vsh.forward.servers import connect
from tests.vsh.live import wait_until
from vmkit.builder.start import LOG
from vmkit.machine.builders import read_builders
from vmkit.machine.options import make_spec
from vmkit.machine.restore import open_store
from vmkit.machine.save import make_snapshot
from vmkit.snapshots.store import MEMORY, SECRET
from vsh.address import address_of
from vsh.errors import VshError
from vsh.registry import read_machines

# An amount of memory that no other test asks for: the snapshots are in the cache that all tests share.
OPTIONS = ("--accel", "tcg", "--backend", "user", "--memory", "131M")
MACHINES = 4
IDENTITY = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; od -An -tx8 -N16 /dev/urandom; uname -n"
# Runs in the guest, in a session of its own, so it lives on in each copy: sends back all that it gets.
ECHO = """
import os, socket, threading
server = socket.create_server(("127.0.0.1", 7100))
os.close(os.open("/run/echoes", os.O_CREAT))
def serve(connection):
    while data := connection.recv(4096):
        connection.sendall(data)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
START_ECHO = 'setsid python3 -c "$0" > /dev/null 2>&1 < /dev/null & until [ -e /run/echoes ]; do sleep 0.1; done'
AWAIT_GO = "until [ -e /run/go ]; do sleep 0.1; done"


@pytest.fixture(scope="module")
def made(built: None, vmkit: Run) -> Iterator[dict[str, object]]:
    """The snapshot of tiny with OPTIONS, as `vmkit snapshot make --json` printed it."""
    done = vmkit("snapshot", "make", "tiny", *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    yield answer
    if Path(answer["directory"]).exists():
        open_store().remove(Path(answer["directory"]))


@pytest.fixture
def snapshot_name(built: None, vmkit: Run) -> Iterator[str]:
    """The name for a snapshot of the test. One that an interrupted run has left goes first."""
    name = "of-a-test"
    vmkit("snapshot", "rm", name)
    yield name
    vmkit("snapshot", "rm", name)


def restore(number: int, *, token: bool = False) -> vmkit_package.Machine:
    return vmkit_package.Machine(
        "tiny", name=f"copy-{number}", accelerator="tcg", backend="user", memory=131, token=token
    )


def test_made_snapshot_is_listed_and_not_made_twice(made: dict[str, object], vmkit: Run) -> None:
    assert made["was_there"] is False
    again = json.loads(vmkit("snapshot", "make", "tiny", *OPTIONS, "--json").stdout)
    assert (again["was_there"], again["key"]) == (True, made["key"])
    listed = json.loads(vmkit("snapshot", "list", "--json").stdout)
    assert made["key"] in [one["key"] for one in listed]
    shown = json.loads(vmkit("snapshot", "show", str(made["name"]), "--json").stdout)
    assert shown["facts"]["accelerator"] == "tcg"
    assert not [machine for machine in read_machines() if machine.name.startswith("saving")]
    # Zero pages take no room.
    assert int(str(made["size_bytes"])) < 110 << 20


def test_machines_of_one_snapshot_are_machines_of_their_own(made: dict[str, object]) -> None:
    machines = [restore(number, token=True) for number in range(MACHINES)]
    try:
        for machine in machines:
            machine.start()
        assert {machine.started.started_by for machine in machines} == {"snapshot"}
        seen = [machine.run(["sh", "-c", IDENTITY], text=True, check=True).stdout.split() for machine in machines]
        for kind, values in enumerate(zip(*seen, strict=True)):
            assert len(set(values)) == MACHINES, (kind, values)
        assert [words[-1] for words in seen] == [machine.name for machine in machines]
        assert len({machine.cid for machine in machines}) == MACHINES
        assert len({(machine.directory / "token").read_bytes() for machine in machines}) == MACHINES
        for machine in machines:
            assert read_clock_error_s(machine.connect()) < CLOCK_LIMIT_S
            assert machine.find_entry().record["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
        # The token of one opens no other, and the snapshot's opens none.
        first, second = (address_of(machine.find_entry()) for machine in machines[:2])
        for token_file in (first.token_file, str(Path(str(made["directory"])) / SECRET)):
            second.token_file = token_file
            with pytest.raises(VshError, match="did not prove"):
                vmkit_package.Client(second).run(["true"])
    finally:
        for machine in machines:
            machine.kill()


def test_restored_guest_goes_on_as_a_booted_one(made: dict[str, object]) -> None:
    """Its timers run, its kernel has the wall's programs, it can be stopped, and vshd comes back when it dies."""
    with restore(1) as machine:
        script = "read up _ < /proc/uptime; sleep 1; read later _ < /proc/uptime; echo $up $later"
        up, later = map(float, machine.run(["sh", "-c", script], text=True).stdout.split())
        # Of two numbers with two digits behind the point.
        assert 0.99 < later - up < 10.0
        loop = "import socket; socket.socket(socket.AF_VSOCK).connect((1, 9001))"
        assert b"PermissionError" in machine.run(["python3", "-c", loop]).stderr
        machine.run(["sh", "-c", "kill -9 $(cat /proc/$PPID/stat | cut -d' ' -f4)"])

        def is_back() -> bool:
            try:
                return machine.run(["true"], timeout=10).exit == 0
            except VshError:
                return False

        wait_until(is_back, "vshd serves again")
        machine.down()


@pytest.mark.slow
def test_machines_of_debian_12s_kernel_are_machines_of_their_own(built: None, tmp_path: Path) -> None:
    """Its kernel for clouds has no vmgenid: what parts the copies is what the thaw gives vshd."""
    image = write_recipe(tmp_path, KERNELS["6.1"])
    seen = []
    made = make_snapshot(make_spec(image, {"memory": "131M", "accelerator": "tcg", "backend": "user"}))
    try:
        for number in range(2):
            with vmkit_package.Machine(
                image, name=f"old-{number}", accelerator="tcg", backend="user", memory=131
            ) as machine:
                assert machine.started.started_by == "snapshot"
                assert machine.run(["uname", "-r"], text=True).stdout.startswith("6.1.")
                seen.append(machine.run(["sh", "-c", IDENTITY], text=True, check=True).stdout.split())
                assert read_clock_error_s(machine.connect()) < CLOCK_LIMIT_S
                assert machine.find_entry().record["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
    finally:
        open_store().remove(made.snapshot.folder)
    assert all(one != other for one, other in zip(*seen, strict=True)), seen


def test_up_says_which_and_boots_on_demand(made: dict[str, object], up: Run, vsh: Run, vmkit: Run) -> None:
    # The order of the options is no fact.
    options = ("--memory", "131M", "--backend", "user")
    done = up(*options, "--name", "restored")
    assert f"from the snapshot {made['name']}".encode() in done.stdout, done.stderr
    assert vsh("--vm_name", "restored", "--", "uname", "-n").stdout == b"restored\n"
    assert json.loads(vmkit("status", "restored", "--json").stdout)["started_by"] == "snapshot"
    booted = json.loads(up(*options, "--name", "booted", "--boot", "--json").stdout)
    assert (booted["started_by"], booted["snapshot"]) == ("boot", None)
    assert vmkit("down", "restored", "booted").returncode == 0


def test_second_boot_makes_the_snapshot_of_the_third_start(up: Run, vsh: Run, vmkit: Run) -> None:
    def start(*words: str) -> bytes:
        options = ("--backend", "user", "--memory", "133M", "--name", "often", *words)
        done = up(*options, env={"VMKIT_BACKGROUND_SNAPSHOTS": "on", "CI": ""})
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    assert b"in the background" not in start()
    assert vmkit("down", "often").returncode == 0
    assert b"a snapshot is made in the background" in start()
    (builder,) = read_builders()
    process = os.pidfd_open(builder.pid)
    hurry_builder()
    try:
        # It holds up neither the user's machine nor its end.
        assert vsh("--vm_name", "often", "--", "echo", "mine").stdout == b"mine\n"
        assert vmkit("down", "often").returncode == 0
        assert select.select([process], [], [], DEADLINE_S)[0]
    finally:
        os.close(process)
    text = (open_store().folder / LOG).read_text()
    assert "made in" in text, text
    assert json.loads(start("--json"))["started_by"] == "snapshot"
    assert vsh("--vm_name", "often", "--", "uname", "-n").stdout == b"often\n"
    assert vmkit("down", "often").returncode == 0


def test_set_up_is_paid_for_once(snapshot_name: str, up: Run, vsh: Run, vmkit: Run) -> None:
    words = ("--run", "echo ready > /root/prepared", "--run", "mkdir /root/$(cat /root/prepared)")
    done = vmkit("snapshot", "save", snapshot_name, "--image", "tiny", *words, *OPTIONS)
    assert done.returncode == 0, done.stderr.decode()
    again = vmkit("snapshot", "save", snapshot_name, *OPTIONS)
    assert again.returncode == 1 and f"there is a snapshot '{snapshot_name}' already".encode() in again.stderr
    started = json.loads(up("--snapshot", snapshot_name, "--name", "suite", "--json").stdout)
    assert (started["started_by"], started["snapshot"], started["image"]) == ("snapshot", snapshot_name, "tiny")
    assert vsh("--vm_name", "suite", "--", "ls", "/root").stdout == b"prepared\nready\n"
    refused = up("--snapshot", snapshot_name, "--memory", "512M")
    assert refused.returncode == 64 and b"has another memory" in refused.stderr


def test_guest_is_saved_under_a_forward(snapshot_name: str, up: Run, vsh: Run) -> None:
    """The save ends the forward, with a line. A copy has nothing left of it, and serves a forward of its own."""
    argv = [str(BIN / "vmkit"), "snapshot", "save", snapshot_name, "--run", AWAIT_GO, *OPTIONS]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            name = await_builder(process)
            assert vsh("--vm_name", name, "--", "sh", "-c", START_ECHO, ECHO).returncode == 0
            words = ("--vm_name", name, "-v", "-N", "-L", "0:localhost:7100")
            with running(*words, stream="stderr") as (forward, told), connect(port_of(told)) as client:
                echo(client, b"before")
                assert vsh("--vm_name", name, "--", "touch", "/run/go").returncode == 0
                _, said = process.communicate(timeout=DEADLINE_S)
                assert process.returncode == 0, said.decode()
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
                with contextlib.suppress(ConnectionResetError), connect(port_of(told)) as late:
                    assert late.recv(1) == b""
                assert forward.stderr is not None
                assert name.encode() in forward.stderr.readline()
        finally:
            process.kill()
    assert up("--snapshot", snapshot_name, "--name", "copy").returncode == 0
    line = rb": closed, after 1 connections, after .*: forward to tcp:localhost:7100, with branches\n"
    assert re.search(line, vsh("--vm_name", "copy", "--", "dmesg").stdout)
    with running("--vm_name", "copy", "-v", "-N", "-L", "0:localhost:7100", stream="stderr") as (forward, told):
        for _ in range(2):
            with connect(port_of(told)) as client:
                try:
                    echo(client, b"after")
                except ConnectionResetError as error:
                    forward.terminate()
                    assert forward.stderr is not None
                    raise AssertionError(forward.stderr.read().decode()) from error


def await_builder(process: "subprocess.Popen[bytes]") -> str:
    """The name of the machine that a builder has started, once it is ready."""
    ready: list[str] = []

    def look() -> bool:
        ready[:] = [one.name for one in read_machines() if one.name.startswith("saving") and one.state == "ready"]
        return bool(ready) or process.poll() is not None

    wait_until(look, "the machine is ready", DEADLINE_S)
    assert ready, process.stderr and process.stderr.read()
    return ready[0]


def echo(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    assert client.recv(len(data), socket.MSG_WAITALL) == data


def test_command_that_fails_leaves_no_snapshot(built: None, vmkit: Run) -> None:
    done = vmkit("snapshot", "save", "broken", "--run", "echo why >&2; exit 3", *OPTIONS)
    assert done.returncode != 0 and b"why" in done.stderr, done.stderr
    assert not open_store().find_named("broken").exists()
    assert not [machine for machine in read_machines() if machine.name.startswith("saving")]


def test_damaged_snapshot_is_a_line_and_a_boot(made: dict[str, object], up: Run) -> None:
    """The last test with it."""
    path = Path(str(made["directory"])) / MEMORY
    with path.open("r+b") as file:
        file.seek(50 << 20)
        byte = file.read(1)
        file.seek(50 << 20)
        file.write(bytes([byte[0] ^ 1]))
    done = up("--memory", "131M", "--backend", "user", "--name", "late", "--json")
    assert json.loads(done.stdout)["started_by"] == "boot"
    assert b"the snapshot is damaged" in done.stderr and b"the machine boots instead" in done.stderr
    assert not path.exists()


def test_killed_builder_leaves_nothing(built: None, folders: Path) -> None:
    argv = [str(BIN / "vmkit"), "snapshot", "save", "half", *OPTIONS]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        await_builder(process)
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(one.name.startswith("saving") for one in read_machines()), "the machine is gone")
    assert not open_store().find_named("half").exists()
