"""The kernel's own vhost-vsock, for real: a machine in a machine, reached over /dev/vhost-vsock and AF_VSOCK.

The host here may have neither. The image `nested`, run by vmkit itself, has both, and a KVM on an emulated processor.
One inner machine serves all tests of this file.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.host_machine import INNER_TIMEOUT_S, HostMachine

PATIENT_S = 120.0


@pytest.fixture(scope="module")
def inner(host_machine: HostMachine) -> Iterator[HostMachine]:
    """The host VM with a machine of tiny in it, CID 3, on the backend vhost."""
    words = ["vmkit", "up", "--backend", "vhost", "--json", "--timeout", str(INNER_TIMEOUT_S)]
    result = host_machine.run(*words, timeout_s=INNER_TIMEOUT_S + 60)
    assert result.exit == 0, result.stderr.decode()
    told = json.loads(result.stdout)
    print(f"nested: the inner machine was ready after {told['seconds']} s")
    # The emulated processor has AMD's virtualisation: vmkit has proven this KVM, as it does anywhere.
    assert (told["cid"], told["backend"], told["accelerator"]) == (3, "vhost", "kvm")
    yield host_machine
    host_machine.end_machines()


def test_files_go_in_and_out(host_machine: HostMachine, tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/file").write_bytes(b"\0data")
    host_machine.put(tmp_path / "in", "/srv/put/here")
    assert host_machine.check("sha1sum", "/srv/put/here/deep/file").split()[0] == hashlib.sha1(b"\0data").hexdigest()
    host_machine.get("/srv/put/here", tmp_path / "out")
    assert (tmp_path / "out/here/deep/file").read_bytes() == b"\0data"


def test_host_has_what_it_is_for(host_machine: HostMachine) -> None:
    told = json.loads(host_machine.run("vmkit", "doctor", "--json", timeout_s=PATIENT_S).stdout)
    levels = {check["name"]: check["level"] for check in told["checks"]}
    assert told["works"]
    assert (levels["vhost-vsock"], levels["af_vsock"], levels["qemu"]) == ("ok", "ok", "ok")
    assert re.search(r"^tiny +yes", host_machine.check("vmkit", "images", timeout_s=PATIENT_S), re.MULTILINE)


def test_vsh_reaches_the_inner_machine_over_the_kernel_s_vsock(inner: HostMachine) -> None:
    record = json.loads(inner.check("vmkit", "status", "--json", timeout_s=PATIENT_S))
    assert (record["backend"], record["state"]) == ("vhost", "ready")
    # No socket file stands in for it, and QEMU holds the kernel's device.
    assert record["vsock"] is None
    links = inner.check("sh", "-c", f"ls -l /proc/{record['qemu_pid']}/fd")
    assert "/dev/vhost-vsock" in links
    result = inner.run("vsh", "--cid", "3", "--", "sh", "-c", "uname -n; echo err >&2; exit 7", timeout_s=PATIENT_S)
    assert (result.stdout, result.stderr, result.exit) == (b"tiny\n", b"err\n", 7)


def test_data_comes_whole_over_the_kernel_s_vsock(inner: HostMachine) -> None:
    data = os.urandom(1_000_000)
    result = inner.run("vsh", "--cid", "3", "--", "cat", input=data, timeout_s=PATIENT_S)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_cid_in_use_is_told_by_the_kernel(inner: HostMachine) -> None:
    result = inner.run("vmkit", "up", "-q", "--backend", "vhost", "--cid", "3", "--name", "b", timeout_s=PATIENT_S)
    assert result.exit == 1
    assert b"CID 3 is in use" in result.stderr


def test_evidence_has_the_inner_machine_s_logs_and_no_token(inner: HostMachine, tmp_path: Path) -> None:
    inner.save_evidence(tmp_path)
    names = {path.name for path in (tmp_path / "machines/tiny").iterdir()}
    assert {"console.log", "qmp.log", "events.jsonl"} <= names
    assert "token" not in names
    assert b"vshd: " in (tmp_path / "host.dmesg").read_bytes()


def test_inner_machine_powers_off(inner: HostMachine) -> None:
    """The last test of this file: nothing of the machine is left."""
    assert "tiny is down" in inner.check("vmkit", "down", "--timeout", "60", timeout_s=PATIENT_S)
    assert inner.run("sh", "-c", "ls /tmp/vmkit-0/machines; pgrep -x -f 'qemu-system.*'").stdout == b""
