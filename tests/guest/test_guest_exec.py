"""vsock_guest_exec's modes in a real guest: beside vshd, and before vshd and init's rest."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.guest.conftest import BIN, DEADLINE_S, Run
from vmkit.pool.pool import PooledMachine
from vsh.registry import find_machine

PEER = Path(__file__).parents[1] / "fakes/guest_exec_host.py"
PORT = 2049


def test_host_of_the_source_and_ours_serve_a_guest(built: None, vm: PooledMachine, vmkit: Run) -> None:
    entry = vm.find_entry()
    with subprocess.Popen(
        [sys.executable, "-I", str(PEER), f"{entry.vsock}_{PORT}", "persistent", "echo of the peer", "exit 5"],
        stdout=subprocess.PIPE,
    ) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"listening\n"
        done = vm.run(["vshd", "--exec-from", f":{PORT}", "persistent"], timeout=DEADLINE_S, text=True)
        assert (done.returncode, done.stdout) == (0, "of the peer\n")
        assert peer.wait(DEADLINE_S) == 0
    with subprocess.Popen(
        [BIN / "vmkit", "guest-exec", vm.name, "echo of ours; exit 6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as host:
        # It listens once the guest can connect: a guest that is earlier tries again.
        script = "for i in $(seq 300); do vshd --exec-from foo:bar; [ $? = 6 ] && exit 6; sleep 0.1; done"
        done = vm.run(["sh", "-c", script], timeout=DEADLINE_S, text=True)
        assert (done.returncode, done.stdout) == (6, "of ours\n")
        assert host.communicate(timeout=DEADLINE_S) == (b"", b"")
        assert host.returncode == 0


def test_command_runs_before_vshd_serves(built: None, own_registry: None, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    """The hook of an image waits for a command of the host, and the machine becomes ready only after it."""
    hook = f"#!/bin/sh\nuntil vshd --exec-from :{PORT}; do sleep 0.2; done\n"
    (tmp_path / "early.toml").write_text(f"extends = 'tiny'\nhook = {{ content = {json.dumps(hook)} }}\n")
    assert vmkit("build", str(tmp_path / "early.toml"), "-q").returncode == 0
    up = [str(BIN / "vmkit"), "up", str(tmp_path / "early.toml"), "--name", "early", "--boot", "--json", "-q"]
    with subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as starting:
        try:
            deadline_s = time.monotonic() + DEADLINE_S
            while find_machine(name="early") is None:
                assert starting.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            words = ("guest-exec", "early", "--port", str(PORT), "--timeout", str(DEADLINE_S))
            done = vmkit(*words, "echo $PPID > /run/early")
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            out, err = starting.communicate(timeout=DEADLINE_S)
            assert starting.returncode == 0, err.decode()
            assert json.loads(out)["name"] == "early"
        finally:
            starting.kill()
    assert vmkit("dmesg", "early").stdout.count(b"vsock 2:2049: echo $PPID > /run/early: exit 0") == 1
    assert vsh("--vm_name", "early", "--", "cat", "/run/early").stdout.strip().isdigit()
