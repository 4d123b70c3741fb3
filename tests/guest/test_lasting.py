"""Sessions that last, in a real guest: what ends their clients does not end them."""

import subprocess
import time

from tests.guest.conftest import BIN, DEADLINE_S
from tests.vsh.live import wait_until
from vmkit.pool.pool import PooledMachine

# Prints a line for each line of its input.
ECHO = 'while read line; do echo "got $line"; [ "$line" = end ] && exit 3; done'
PAUSE_S = 2.0


def vsh(machine: PooledMachine, *words: str, data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [str(BIN / "vsh"), "--vm_name", machine.name, *words],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_session_outlives_clients_a_pause_and_the_vsock_device(built: None, vm: PooledMachine) -> None:
    started = vsh(vm, "--detach=echo", "--", "sh", "-c", ECHO)
    assert started.returncode == 0, started.stderr.decode()
    argv = [str(BIN / "vsh"), "--vm_name", vm.name, "--attach=echo"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"one\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"got one\n"
        client.kill()
    vm.pause()
    time.sleep(PAUSE_S)
    vm.resume()
    assert vsh(vm, "--input=echo", "--steal", data=b"two\n").returncode == 0
    # The monitor starts another device in its place.
    argv = [str(BIN / "vmkit"), "vsock", "fault", vm.name, "kill"]
    subprocess.run(argv, capture_output=True, timeout=DEADLINE_S, check=True)
    wait_until(lambda: vsh(vm, "--", "true").returncode == 0, "the new device carries connections")
    assert vsh(vm, "--input=echo", "--steal", data=b"end\n").returncode == 0
    assert vsh(vm, "--wait=echo").returncode == 3
    assert vsh(vm, "--output=echo", "--since=8").stdout == b"got two\ngot end\n"
    assert vsh(vm, "--forget=echo").returncode == 0
