"""ssh over vsock with the image bench: the machine's own keys, ssh, scp and sftp."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vsh.registry import find_machine

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def bench(vmkit: Run) -> Iterator[str]:
    done = vmkit("up", "bench", "--accel", "tcg", "--name", "rival", timeout_s=400)
    assert done.returncode == 0, done.stderr.decode()
    yield "rival"
    vmkit("kill", "rival")


def test_ssh_runs_commands_with_keys_made_for_the_machine(bench: str, vmkit: Run) -> None:
    done = vmkit("ssh", bench, "echo out; echo err >&2; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"out\n", b"err\n")
    assert vmkit("ssh", bench, "-T", "--", "cat", stdin=b"typed").stdout == b"typed"
    machine = find_machine(name=bench)
    assert machine is not None
    key = Path(machine.directory) / "ssh" / "key"
    assert key.stat().st_mode & 0o777 == 0o600


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
    """Another host key is refused: it came over vsh, and is not learnt on first use."""
    machine = find_machine(name=bench)
    assert machine is not None
    known = Path(machine.directory) / "ssh" / "known_hosts"
    before = known.read_text()
    kind, key = before.split()[1:3]
    known.write_text(f"{bench} {kind} {key[:-8]}AAAAAAAA\n")
    try:
        assert vmkit("ssh", bench, "true").returncode == 255
    finally:
        known.write_text(before)
    assert vmkit("ssh", bench, "true").returncode == 0


def test_machine_without_sshd_is_told(ready: str, vmkit: Run) -> None:
    done = vmkit("ssh", ready, "true")
    assert done.returncode == 1
    assert b"has no sshd" in done.stderr
    assert b"vmkit up bench" in done.stderr


def test_terminal_is_a_terminal(bench: str, vmkit: Run) -> None:
    done = vmkit("ssh", bench, "-tt", "tty; stty -a | grep -o -E ' -?echo '")
    assert done.stdout.startswith(b"/dev/pts/"), done
    assert b" echo" in done.stdout
