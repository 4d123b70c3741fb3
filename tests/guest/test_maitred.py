"""maitred in a real guest: the option of a recipe, `vmkit rpc`, a client made with grpcio, and who is kept away."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmkit
from tests.guest.conftest import DEADLINE_S, Run
from tests.vmkit.maitred.google import CLASSES
from tests.vsh.live import CHECKOUT, ENVIRONMENT, Program, ended, is_listening, wait_until
from vmkit import Maitred
from vsh.address import find_by_name

# Building its image takes most of a minute.
pytestmark = pytest.mark.slow

STRANGER = """
import errno, socket
def attempt(family, address):
    try:
        with socket.socket(family) as s:
            s.settimeout(10)
            s.connect(address)
            s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n")
            return "served" if s.recv(1) else "closed"
    except ConnectionResetError:
        return "closed"
    except OSError as error:
        return errno.errorcode[error.errno]
print(attempt(socket.AF_VSOCK, (1, 8888)), attempt(socket.AF_UNIX, "/run/maitred.sock"))
"""


# In the words of pid 1 and vshd its path is as well.
PROCESS = "ISB /usr/sbin/maitred"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("maitred") / "maitred.toml"
    path.write_text('extends = "debian"\nservices = ["maitred"]\n')
    return str(path)


@pytest.fixture(scope="module")
def machine(recipe: str, folders: Path) -> Iterator[vmkit.Machine]:
    with vmkit.Machine(recipe, accelerator="tcg", backend="user", name="agent") as started:
        yield started


def count_processes(machine: vmkit.Machine) -> int:
    return int(machine.run(["pgrep", "-c", "-f", PROCESS], text=True).stdout)


def ask(vmkit: Run, name: str, method: str, request: object = None) -> object:
    done = vmkit("rpc", name, "maitred", method, json.dumps(request or {}))
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_maitred_serves_the_host(machine: vmkit.Machine, vmkit: Run) -> None:
    # Before the first call there is no server.
    wait_until(lambda: count_processes(machine) == 1, "pid 1 starts the service, behind READY")
    release = machine.run(["uname", "-r"], text=True).stdout.strip()
    version = ask(vmkit, "agent", "GetKernelVersion")
    assert isinstance(version, dict)
    assert version["kernel_release"] == release
    assert count_processes(machine) == 2
    words = {"argv": ["sh", "-c", "id -u > /run/who; kill -9 $$"], "wait_for_exit": True}
    assert ask(vmkit, "agent", "LaunchProcess", words) == {"status": "SIGNALED", "code": 9}
    assert machine.run(["cat", "/run/who"], text=True).stdout == "0\n"
    # A user of the guest has no way to it.
    stranger = machine.run(["python3", "-c", STRANGER], user="user", text=True, timeout=DEADLINE_S)
    assert stranger.stdout in ("EPERM EACCES\n", "ECONNRESET EACCES\n", "ENODEV EACCES\n"), stranger


def test_guest_is_changed_as_it_was_asked(machine: vmkit.Machine) -> None:
    with machine.maitred(timeout_s=DEADLINE_S) as maitred:
        assert maitred.set_up_user("ann", uid=1001, groups=["video"]) == "ann"
        assert "1001(ann)" in machine.run(["id", "ann"], text=True).stdout
        assert "(video)" in machine.run(["id", "ann"], text=True).stdout
        assert machine.run(["pwd"], user="ann", text=True).stdout == "/home/ann\n"
        maitred.set_timezone("Asia/Tokyo")
        assert machine.run(["date", "+%Z"], text=True).stdout == "JST\n"
        maitred.mount("tmpfs", "/srv/a/b", "tmpfs", options="size=1m", create_target=True, permissions=0o700)
        assert "tmpfs /srv/a/b tmpfs rw," in machine.run(["cat", "/proc/mounts"], text=True).stdout
        with pytest.raises(vmkit.MachineError, match="cannot mount /srv/a: No such device"):
            maitred.mount("none", "/srv/a", "nonsense")
        with pytest.raises(vmkit.MachineError, match="Failed to connect to vsock 2:564"):
            maitred.mount_9p(564, "/srv/shared")
        maitred.prepare_to_suspend()
        maitred.set_time(time.time() + 1000)
        ahead = int(machine.run(["date", "+%s"], text=True).stdout) - time.time()
        maitred.set_time(time.time())
        assert 900 < ahead < 1100
        # A program that was launched outlives the server.
        maitred.launch_process(["sleep", "1000"])
    server = machine.run(["pgrep", "-n", "-f", PROCESS], text=True).stdout.strip()
    machine.run(["kill", "-9", server], check=True)
    with Maitred(find_by_name("agent"), timeout_s=DEADLINE_S) as maitred:
        assert maitred.get_available_space() > 0
    assert machine.run(["pgrep", "-x", "sleep"]).exit == 0


def test_client_of_grpcio_reaches_it_through_a_forward(machine: vmkit.Machine, tmp_path: Path) -> None:
    path = tmp_path / "maitred.sock"
    words = ["--vm_name=agent", "-N", "-L", f"{path}:vsock:8888"]
    with ended(Program([sys.executable, "-m", "vsh", *words])):
        wait_until(lambda: is_listening(path), "vsh listens")
        program = [sys.executable, "-m", "tests.vmkit.maitred.grpcio_program", str(path)]
        line = f"LaunchProcess {CLASSES['LaunchProcessRequest'](argv=['/nonexistent']).SerializeToString().hex()}\n"
        done = subprocess.run(
            program,
            input=line.encode(),
            capture_output=True,
            timeout=DEADLINE_S,
            check=True,
            env=ENVIRONMENT,
            cwd=CHECKOUT,
        )
    status, _, reply = done.stdout.decode().strip().partition(" ")
    assert status == "OK", done
    assert CLASSES["LaunchProcessResponse"].FromString(bytes.fromhex(reply)).status == 4


def test_guest_goes_down_when_asked(machine: vmkit.Machine, vmkit: Run) -> None:
    assert ask(vmkit, "agent", "Shutdown") == {}
    assert machine.wait(DEADLINE_S) is not None


def test_maitred_of_a_machine_with_a_token_is_behind_vshd(recipe: str, folders: Path, vmkit: Run) -> None:
    with vmkit_machine(recipe) as started:
        assert isinstance(ask(vmkit, "proven", "GetAvailableSpace"), dict)
        # As any program of the host that can connect, without the token.
        address = find_by_name("proven")
        address.token_file = ""
        with Maitred(address, timeout_s=DEADLINE_S) as maitred, pytest.raises(vmkit_error, match="ended during"):
            maitred.get_available_space()
        assert started.run(["true"]).exit == 0


def vmkit_machine(recipe: str) -> vmkit.Machine:
    """The fixture `vmkit` hides the module."""
    return vmkit.Machine(recipe, accelerator="tcg", backend="user", name="proven", token=True)


vmkit_error = vmkit.ConnectionLost
