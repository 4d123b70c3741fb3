"""ssh over vsock with the image bench: keys of the machine's name, ssh, scp and sftp."""

import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from vmkit.ssh.keys import find_folder
from vsh.address import address_of
from vsh.client import Client
from vsh.forward.guest import connect_guest
from vsh.registry import find_machine


def start(vmkit: Run, name: str) -> None:
    done = vmkit("up", "bench", "--accel", "tcg", "--name", name, timeout_s=400)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(scope="module")
def bench(vmkit: Run) -> Iterator[str]:
    start(vmkit, "rival")
    yield "rival"
    vmkit("kill", "rival")


def test_ssh_runs_commands_with_keys_made_for_the_machine(bench: str, vmkit: Run) -> None:
    done = vmkit("ssh", bench, "echo out; echo err >&2; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"out\n", b"err\n")
    assert vmkit("ssh", bench, "-T", "--", "cat", stdin=b"typed").stdout == b"typed"
    folder = find_folder(bench)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir() if path.suffix != ".pub"} == {0}


def test_config_serves_scp_and_sftp(bench: str, vmkit: Run, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(vmkit("ssh-config", bench).stdout)
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)) * 4000)
    for argv in (
        ["scp", "-F", str(config), str(data), f"{bench}:/tmp/copied"],
        ["scp", "-F", str(config), f"{bench}:/tmp/copied", str(tmp_path / "back")],
        ["sftp", "-F", str(config), "-b", "-", bench],
    ):
        done = subprocess.run(argv, input=b"ls /tmp/copied\n", capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_bytes() == data.read_bytes()


def test_host_key_is_checked(bench: str, vmkit: Run) -> None:
    """A guest that shows another host key than vsh has fetched is refused; no key is learnt on first use."""
    assert vmkit("ssh", bench, "true").returncode == 0
    swap = "cd /etc/ssh && mv {0} kept && ssh-keygen -q -t ed25519 -N '' -f {0}; rm -f {0}.pub"
    key = "ssh_host_ed25519_key"
    assert vmkit("ssh", bench, swap.format(key)).returncode == 0
    try:
        refused = vmkit("ssh", bench, "true")
        assert refused.returncode == 255
        assert b"Host key verification failed" in refused.stderr
    finally:
        restore = f"cd /etc/ssh && mv kept {key} && ssh-keygen -y -f {key} > {key}.pub"
        machine = find_machine(name=bench)
        assert machine is not None
        assert Client(address_of(machine)).run(["sh", "-c", restore]).exit == 0
    assert vmkit("ssh", bench, "true").returncode == 0


def test_damaged_key_is_renewed_while_the_machine_runs(bench: str, vmkit: Run) -> None:
    assert vmkit("ssh", bench, "true").returncode == 0
    key = find_folder(bench) / "key"
    key.write_text("damaged")
    done = vmkit("ssh", bench, "echo new")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"new\n", b"")
    assert vmkit("ssh", "--forget-keys", bench).returncode == 0
    assert not key.exists()
    assert vmkit("ssh", bench, "echo again").stdout == b"again\n"


def test_two_at_once_exchange_keys_once(bench: str, vmkit: Run) -> None:
    """None of them meets keys that the guest does not have yet."""
    vmkit("ssh", "--forget-keys", bench)
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: vmkit("ssh", bench, "echo x"), range(3)))
    assert [(done.returncode, done.stdout, done.stderr) for done in ended] == [(0, b"x\n", b"")] * 3
    machine = find_machine(name=bench)
    assert machine is not None
    done = Client(address_of(machine)).run(["cat", "/root/.ssh/authorized_keys"])
    public = (find_folder(bench) / "key.pub").read_bytes()
    assert done.stdout.count(public) == 1


def test_config_outlives_the_machine(bench: str, vmkit: Run, tmp_path: Path) -> None:
    """READY of the image means that sshd's port listens. The first connection of ssh brings the keys."""
    config = tmp_path / "config"
    config.write_bytes(vmkit("ssh-config", bench).stdout)
    ssh = ["ssh", "-F", str(config), bench, "cat /proc/sys/kernel/random/boot_id"]
    first = subprocess.run(ssh, capture_output=True, check=False, timeout=120)
    assert (first.returncode, first.stderr) == (0, b"")
    assert vmkit("down", bench, timeout_s=120).returncode == 0
    gone = subprocess.run(ssh, capture_output=True, check=False, timeout=120)
    assert gone.returncode == 255
    assert f"no machine named '{bench}' is running".encode() in gone.stderr
    start(vmkit, bench)
    machine = find_machine(name=bench)
    assert machine is not None
    fd, _ = connect_guest(address_of(machine), "vsock:22", timeout_s=60)
    with socket.socket(fileno=fd) as connection:
        connection.settimeout(60)
        assert connection.recv(8) == b"SSH-2.0-"
    second = subprocess.run(ssh, capture_output=True, check=False, timeout=120)
    assert (second.returncode, second.stderr) == (0, b"")
    assert second.stdout != first.stdout
    assert vmkit("ssh-config", bench).stdout == config.read_bytes()


def test_machine_without_sshd_is_told(ready: str, vmkit: Run) -> None:
    done = vmkit("ssh", ready, "true")
    assert done.returncode == 1
    assert b"has no sshd" in done.stderr
    assert b"vmkit up bench" in done.stderr


def test_terminal_is_a_terminal(bench: str, vmkit: Run) -> None:
    done = vmkit("ssh", bench, "-tt", "tty; stty -a | grep -o -E ' -?echo '")
    assert done.stdout.startswith(b"/dev/pts/"), done
    assert b" echo" in done.stdout
