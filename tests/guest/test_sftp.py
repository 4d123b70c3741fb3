"""SFTP with a real guest that has no ssh server: OpenSSH's sftp through `vsh --subsystem`, as root and as a user."""

import os
import shlex
import subprocess
from pathlib import Path

from tests.guest.conftest import BIN, DEADLINE_S
from vsh.address import address_of
from vsh.client import Client
from vsh.registry import find_machine

# More than any buffer on the way, and no whole number of packets.
SIZE = 3_000_001


def run_sftp(name: str, folder: Path, *commands: str, user: str = "") -> "subprocess.CompletedProcess[bytes]":
    server = [str(BIN / "vsh"), "--vm_name", name, *([f"--user={user}"] if user else []), "-s", "sftp"]
    return subprocess.run(
        ["sftp", "-q", "-D", shlex.join(server), "-b", "-"],
        input="".join(f"{command}\n" for command in commands).encode(),
        capture_output=True,
        cwd=folder,
        timeout=DEADLINE_S,
        check=False,
    )


def test_sftp_copies_both_ways_and_reports_a_full_disk(ready: str, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "big").write_bytes(b"")
    os.truncate(tmp_path / "big", 1 << 30)
    done = run_sftp(ready, tmp_path, "put a /tmp/a", "get /tmp/a b", "ls -l /tmp", "df /tmp", "get /proc/version")
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "b").read_bytes() == data
    assert b" %d " % SIZE in done.stdout
    # The kernel's files have no size.
    assert (tmp_path / "version").read_bytes().startswith(b"Linux version ")
    full = run_sftp(ready, tmp_path, "put big /tmp/big")
    assert full.returncode == 1
    assert b"Failure" in full.stderr
    again = run_sftp(ready, tmp_path, "rm /tmp/big", "rm /tmp/a")
    assert again.returncode == 0, again.stderr.decode()


def test_sftp_runs_as_the_user_that_vsh_names(ready: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    done = run_sftp(ready, tmp_path, "pwd", "put a /tmp/of-1000", user="1000:1000")
    assert done.returncode == 0, done.stderr.decode()
    machine = find_machine(name=ready)
    assert machine is not None
    client = Client(address_of(machine))
    assert client.run(["stat", "-c", "%u %g", "/tmp/of-1000"], text=True).stdout == "1000 1000\n"
    refused = run_sftp(ready, tmp_path, "put a /root/a", user="1000:1000")
    assert refused.returncode == 1
    assert b"ermission denied" in refused.stderr
