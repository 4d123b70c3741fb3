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

from tests.guest.nested import INNER_TIMEOUT_S, NAME, RUNTIME, NestedHost
from tests.guest.test_snapshots import IDENTITY

PATIENT_S = 120.0


@pytest.fixture(scope="module")
def inner(nested_host: NestedHost) -> Iterator[NestedHost]:
    """The host VM with a machine of tiny in it, CID 3, on the backend vhost."""
    words = ["vmkit", "up", "--backend", "vhost", "--json", "--timeout", str(INNER_TIMEOUT_S)]
    result = nested_host.run(*words, timeout_s=INNER_TIMEOUT_S + 60)
    assert result.exit == 0, result.stderr.decode()
    told = json.loads(result.stdout)
    print(f"nested: the inner machine was ready after {told['seconds']} s")
    # The emulated processor has AMD's virtualisation: vmkit has proven this KVM, as it does anywhere.
    assert (told["cid"], told["backend"], told["accelerator"]) == (3, "vhost", "kvm")
    yield nested_host
    nested_host.end_machines()


def test_files_go_in_and_out(nested_host: NestedHost, tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/file").write_bytes(b"\0data")
    nested_host.put(tmp_path / "in", "/srv/put/here")
    assert nested_host.check("sha1sum", "/srv/put/here/deep/file").split()[0] == hashlib.sha1(b"\0data").hexdigest()
    nested_host.get("/srv/put/here", tmp_path / "out")
    assert (tmp_path / "out/here/deep/file").read_bytes() == b"\0data"


def test_host_has_what_it_is_for(nested_host: NestedHost) -> None:
    told = json.loads(nested_host.run("vmkit", "doctor", "--json", timeout_s=PATIENT_S).stdout)
    levels = {check["name"]: check["level"] for check in told["checks"]}
    assert told["works"]
    assert (levels["vhost-vsock"], levels["af_vsock"], levels["qemu"]) == ("ok", "ok", "ok")
    assert re.search(r"^tiny +yes", nested_host.check("vmkit", "images", timeout_s=PATIENT_S), re.MULTILINE)


def test_vsh_reaches_the_inner_machine_over_the_kernel_s_vsock(inner: NestedHost) -> None:
    record = json.loads(inner.check("vmkit", "status", "--json", timeout_s=PATIENT_S))
    assert (record["backend"], record["state"]) == ("vhost", "ready")
    # No socket file stands in for it, and QEMU holds the kernel's device.
    assert record["vsock"] is None
    links = inner.check("sh", "-c", f"ls -l /proc/{record['qemu_pid']}/fd")
    assert "/dev/vhost-vsock" in links
    result = inner.run("vsh", "--cid", "3", "--", "sh", "-c", "uname -n; echo err >&2; exit 7", timeout_s=PATIENT_S)
    assert (result.stdout, result.stderr, result.exit) == (b"tiny\n", b"err\n", 7)


def test_data_comes_whole_over_the_kernel_s_vsock(inner: NestedHost) -> None:
    data = os.urandom(1_000_000)
    result = inner.run("vsh", "--cid", "3", "--", "cat", input=data, timeout_s=PATIENT_S)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_commands_of_the_host_reach_a_guest_over_the_kernel_s_vsock(inner: NestedHost) -> None:
    """vsock_guest_exec's way: the guest connects to CID 2. One that is earlier than the host tries again."""
    guest = "for i in $(seq 100); do vshd --exec-from : 2>/dev/null && exit 0; sleep 0.3; done; exit 1"
    script = f"vmkit guest-exec tiny 'echo ran > /run/ran' & vsh --cid 3 -- sh -c '{guest}' && wait $!"
    result = inner.run("sh", "-c", script, timeout_s=PATIENT_S)
    assert (result.exit, result.stderr) == (0, b""), result.stdout
    assert inner.run("vsh", "--cid", "3", "--", "cat", "/run/ran", timeout_s=PATIENT_S).stdout == b"ran\n"


def test_guest_that_answers_late_is_waited_for(inner: NestedHost) -> None:
    """The kernel gives a connect() on vsock up after 2 s, unless it is told the client's own limit."""
    pid = json.loads(inner.check("vmkit", "status", "--json", timeout_s=PATIENT_S))["qemu_pid"]
    late = f"sleep 5; kill -CONT {pid}"
    script = f"kill -STOP {pid}; ({late}) & vsh --cid 3 --connect_timeout 60 -- echo late"
    result = inner.run("sh", "-c", script, timeout_s=PATIENT_S)
    assert (result.stdout, result.stderr, result.exit) == (b"late\n", b"", 0)


def test_cid_in_use_is_told_by_the_kernel(inner: NestedHost) -> None:
    result = inner.run("vmkit", "up", "-q", "--backend", "vhost", "--cid", "3", "--name", "b", timeout_s=PATIENT_S)
    assert result.exit == 1
    assert b"CID 3 is in use" in result.stderr


def test_machines_of_one_snapshot_have_the_kernel_s_vsock(inner: NestedHost) -> None:
    """Saved without its vsock device, restored with one of another CID: two machines of their own, tokens and all."""
    words = ("--backend", "vhost", "--memory", "128M")
    made = json.loads(
        inner.check("vmkit", "snapshot", "make", "tiny", *words, "--json", timeout_s=INNER_TIMEOUT_S + PATIENT_S)
    )
    seen = []
    try:
        for name in ("first", "second"):
            start = ("--name", name, "--json", "--timeout", str(INNER_TIMEOUT_S))
            done = inner.run("vmkit", "up", *words, *start, timeout_s=INNER_TIMEOUT_S + PATIENT_S)
            told = json.loads(done.stdout)
            assert (told["started_by"], told["backend"]) == ("snapshot", "vhost"), done.stderr.decode()
            shown = inner.check("vsh", "--cid", str(told["cid"]), "--", "sh", "-c", IDENTITY, timeout_s=PATIENT_S)
            token = inner.check("cat", f"{RUNTIME}/machines/{name}/token")
            seen.append([*shown.split(), str(told["cid"]), token])
            assert shown.split()[-1] == name
            record = json.loads(inner.check("vmkit", "status", name, "--json", timeout_s=PATIENT_S))
            assert record["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
    finally:
        for name in ("first", "second"):
            inner.run("vmkit", "kill", name, timeout_s=PATIENT_S)
        inner.run("vmkit", "snapshot", "rm", str(made["key"]), timeout_s=PATIENT_S)
    assert all(one != other for one, other in zip(*seen, strict=True)), seen


def test_evidence_has_the_inner_machine_s_logs_and_no_token(inner: NestedHost, tmp_path: Path) -> None:
    inner.save_evidence(tmp_path)
    names = {path.name for path in (tmp_path / "machines/tiny").iterdir()}
    assert {"console.log", "qmp.log", "events.jsonl"} <= names
    assert "token" not in names
    assert b"vshd: " in (tmp_path / f"{NAME}.dmesg").read_bytes()


def test_inner_machine_powers_off(inner: NestedHost) -> None:
    """The last test of this file: nothing of the machine is left."""
    assert "tiny is down" in inner.check("vmkit", "down", "--timeout", "60", timeout_s=PATIENT_S)
    assert inner.run("sh", "-c", "ls /tmp/vmkit-0/machines; pgrep -x -f 'qemu-system.*'").stdout == b""
