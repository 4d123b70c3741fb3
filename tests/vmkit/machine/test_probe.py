"""What this host can do, with a QEMU that is a script: versions, KVM's proof and its memory, vhost, memory."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from vmkit.errors import CommandError, HostError
from vmkit.machine import probe
from vmkit.machine.probe import Qemu, Verdict, find_qemu, probe_kvm, prove_kvm
from vmkit.machine.spec import Accelerator, Backend

KERNEL = Path("/nonexistent/kernel")
MakeQemu = Callable[[str], Path]


@pytest.fixture
def make_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeQemu:
    """make_qemu(shell script) puts a QEMU on PATH and gives its path; every start is a line in `$0.starts`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(script: str) -> Path:
        path = tmp_path / probe.QEMU
        path.write_text(f'#!/bin/sh\necho "$*" >> "$0.starts"\n{script}\n')
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev/kvm that can be opened, on every host."""
    path = tmp_path / "kvm"
    path.write_text("")
    monkeypatch.setattr(probe, "KVM_DEVICE", str(path))
    return path


def starts(qemu: Path) -> int:
    file = qemu.with_name(qemu.name + ".starts")
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", (10, 0, 2)),
        ("QEMU emulator version 9.1", (9, 1, 0)),
        ("QEMU emulator version 6.0.0-rc1", (6, 0, 0)),
    ],
)
def test_version_is_read_from_what_qemu_says(make_qemu: MakeQemu, text: str, version: tuple[int, int, int]) -> None:
    path = make_qemu(f"echo '{text}'")
    qemu = find_qemu()
    assert qemu == Qemu(str(path), version)
    assert qemu.render_version() == ".".join(map(str, version))


@pytest.mark.parametrize("version", ["5.2.0", "2.12", "0.9.1"])
def test_old_qemu_is_refused(make_qemu: MakeQemu, version: str) -> None:
    make_qemu(f"echo 'QEMU emulator version {version}'")
    with pytest.raises(HostError, match=f"QEMU {version} is too old") as caught:
        find_qemu()
    assert caught.value.hint == "vmkit needs 6.0 or later"


def test_qemu_that_tells_no_version_is_refused_with_its_words(make_qemu: MakeQemu) -> None:
    make_qemu("echo 'I am a teapot'")
    with pytest.raises(HostError, match="cannot tell the version of") as caught:
        find_qemu()
    assert "I am a teapot" in caught.value.details


def test_qemu_that_fails_is_told_with_its_words(make_qemu: MakeQemu) -> None:
    make_qemu("echo 'libfoo.so.1: cannot open shared object file' >&2; exit 127")
    with pytest.raises(CommandError, match="failed with status 127") as caught:
        find_qemu()
    assert "libfoo.so.1" in caught.value.details


def test_missing_qemu_is_told_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="cannot find QEMU") as caught:
        find_qemu()
    assert caught.value.hint == "install it: sudo apt-get install qemu-system-x86"


def test_version_of_an_unchanged_file_is_asked_once(make_qemu: MakeQemu, tmp_path: Path) -> None:
    path = make_qemu("echo 'QEMU emulator version 7.0.0'")
    assert find_qemu(tmp_path).version == find_qemu(tmp_path).version == (7, 0, 0)
    assert starts(path) == 1
    make_qemu("echo 'QEMU emulator version 8.0.0 is longer'")
    assert find_qemu(tmp_path).version == (8, 0, 0)
    assert starts(path) == 2


WORKS = "echo '[ 0.5] Kernel panic - not syncing: VFS: Unable to mount root fs'; sleep 60"
DIES = "echo 'KVM internal error. Suberror: 1' >&2; echo 'emulation failure' >&2; sleep 60"


def prove(qemu: Path, deadline_s: float = 20.0) -> Verdict:
    return prove_kvm(Qemu(str(qemu), (9, 0, 0)), KERNEL, deadline_s)


def test_kernel_that_panics_for_want_of_a_root_proves_kvm(make_qemu: MakeQemu) -> None:
    started_s = time.monotonic()
    assert prove(make_qemu(WORKS)) == Verdict(True, "a kernel booted under it")
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (DIES, "kernels die under it (KVM internal error)"),
        (
            "echo 'qemu: ../accel/kvm/kvm-all.c:2310: failed to initialize kvm: Permission denied' >&2; exit 1",
            "QEMU fails under KVM: ",
        ),
        ("exit 1", "QEMU fails under KVM: no output"),
        (f"echo '{'x' * 1000}' >&2; exit 1", "QEMU fails under KVM: xxx"),
        ("head -c 2000000 /dev/zero; sleep 60", "QEMU fails under KVM: "),
    ],
)
def test_kvm_that_does_not_work_is_told_why(make_qemu: MakeQemu, script: str, reason: str) -> None:
    verdict = prove(make_qemu(script))
    assert not verdict.works
    assert reason in verdict.reason
    assert len(verdict.reason) < 200


def test_kvm_that_hangs_is_given_up(make_qemu: MakeQemu) -> None:
    verdict = prove(make_qemu("echo booting; exec sleep 60"), 0.2)
    assert not verdict.works
    assert "did not boot under it in 0.2 s" in verdict.reason


@pytest.mark.parametrize("emulated", [True, False])
def test_kvm_of_an_emulated_host_is_given_more_time(
    make_qemu: MakeQemu, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated: bool
) -> None:
    monkeypatch.setattr(probe, "is_emulated", lambda: emulated)
    monkeypatch.setattr(probe, "KVM_DEADLINE_S", 0.2)
    qemu = Qemu(str(make_qemu(f"sleep 1; {WORKS}")), (9, 0, 0))
    assert probe_kvm(qemu, KERNEL, tmp_path).works is emulated


def test_proof_leaves_no_process(make_qemu: MakeQemu, tmp_path: Path) -> None:
    """Not even one that a QEMU which is a script has started."""
    prove(make_qemu(f"sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; {WORKS}"))
    assert not Path(f"/proc/{int((tmp_path / 'pid').read_text())}").exists()
    # SIGKILL is on its way when the proof returns, and an orphan is there until its new parent has reaped it.
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(int((tmp_path / "child").read_text()))
        assert select.select([ended], [], [], 10)[0]
        os.close(ended)


def test_qemu_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot start QEMU: No such file or directory"):
        prove(tmp_path / "nothing")


def test_verdict_is_remembered_for_this_boot_and_version(make_qemu: MakeQemu, device: Path, tmp_path: Path) -> None:
    path = make_qemu(DIES)
    first = probe_kvm(Qemu(str(path), (9, 0, 0)), KERNEL, tmp_path)
    make_qemu(WORKS)
    assert probe_kvm(Qemu(str(path), (9, 0, 0)), KERNEL, tmp_path) == first
    assert starts(path) == 1
    assert probe_kvm(Qemu(str(path), (9, 0, 1)), KERNEL, tmp_path).works
    assert starts(path) == 2


def test_verdict_of_another_boot_counts_for_nothing(
    make_qemu: MakeQemu, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = Qemu(str(make_qemu(DIES)), (9, 0, 0))
    monkeypatch.setattr(probe, "_read_boot_id", lambda: "another boot")
    assert not probe_kvm(qemu, KERNEL, tmp_path).works
    monkeypatch.undo()
    monkeypatch.setattr(probe, "KVM_DEVICE", str(device))
    make_qemu(WORKS)
    assert probe_kvm(qemu, KERNEL, tmp_path).works


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'"x"', b'{"key": 1}', b"\xff", b"[" * 20_000, b'{"works": true}']
)
def test_verdict_that_cannot_be_read_is_found_anew(
    make_qemu: MakeQemu, device: Path, tmp_path: Path, text: bytes
) -> None:
    (tmp_path / probe.VERDICT_FILE).write_bytes(text)
    assert probe_kvm(Qemu(str(make_qemu(WORKS)), (9, 0, 0)), KERNEL, tmp_path).works
    assert json.loads((tmp_path / probe.VERDICT_FILE).read_text())["works"] is True


def test_verdict_that_cannot_be_kept_is_still_given(make_qemu: MakeQemu, device: Path, tmp_path: Path) -> None:
    qemu = Qemu(str(make_qemu(WORKS)), (9, 0, 0))
    assert probe_kvm(qemu, KERNEL, tmp_path / "nowhere").works
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / f"{probe.VERDICT_FILE}.{os.getpid()}").symlink_to("/dev/full")
    assert probe_kvm(qemu, KERNEL, tmp_path / "full").works


def test_nothing_is_started_where_it_may_not_be(make_qemu: MakeQemu, device: Path, tmp_path: Path) -> None:
    path = make_qemu(WORKS)
    verdict = probe_kvm(Qemu(str(path), (9, 0, 0)), KERNEL, tmp_path, prove=False)
    assert verdict == Verdict(False, "vmkit tests KVM when it starts the first machine")
    assert starts(path) == 0
    assert probe_kvm(Qemu(str(path), (9, 0, 0)), KERNEL, tmp_path).works
    assert probe_kvm(Qemu(str(path), (9, 0, 0)), KERNEL, tmp_path, prove=False).works


def test_host_without_kvm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", str(tmp_path / "nothing"))
    assert probe_kvm(Qemu("qemu", (9, 0, 0)), KERNEL, tmp_path) == Verdict(
        False, f"this host has no {tmp_path / 'nothing'}"
    )


def test_kvm_that_may_not_be_opened_is_told() -> None:
    """As a user without rights, whoever runs the tests. A file that nobody may write stands for the device."""
    script = (
        "import os\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "probe.KVM_DEVICE = '/proc/sys/kernel/version'\n"
        "print(probe.check_kvm_device().reason)\n"
    )
    # Imported before the rights go: the checkout may be readable by its owner only.
    words = [sys.executable, "-c", f"from vmkit.machine import probe\n{script}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "cannot open /proc/sys/kernel/version: Permission denied\n"


class Door:
    """/dev/vhost-vsock that opens, or does not."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def open_device(self) -> int:
        if self.error:
            raise OSError(self.error, "no")
        return os.open("/dev/null", os.O_RDWR)

    def set_guest_cid(self, fd: int, cid: int) -> None:
        raise AssertionError("a probe claims nothing")


def test_vhost_works_where_its_device_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSH_AF_VSOCK")
    with nothing_left_open():
        assert probe.probe_vhost(Door()) == Verdict(True, "vmkit can open /dev/vhost-vsock")
        assert probe.probe_vhost(Door(13)) == Verdict(False, "/dev/vhost-vsock: Permission denied")


def test_vhost_is_not_even_opened_where_vsock_is_denied() -> None:
    assert probe.probe_vhost(Door()) == Verdict(False, "VSH_AF_VSOCK=deny is set")


WORKING, BROKEN = Verdict(True, "fine"), Verdict(False, "broken")


@pytest.mark.parametrize(
    ("asked", "kvm", "chosen"),
    [
        (None, WORKING, (Accelerator.KVM, "")),
        (None, BROKEN, (Accelerator.TCG, "broken")),
        (None, None, (Accelerator.TCG, "vmkit did not test KVM")),
        (Accelerator.KVM, None, (Accelerator.KVM, "")),
        (Accelerator.KVM, BROKEN, (Accelerator.KVM, "")),
        (Accelerator.TCG, WORKING, (Accelerator.TCG, "")),
    ],
)
def test_accelerator_is_the_asked_one_else_the_proven_one(
    asked: Accelerator | None, kvm: Verdict | None, chosen: tuple[Accelerator, str]
) -> None:
    assert probe.choose_accelerator(asked, kvm) == chosen


@pytest.mark.parametrize(
    ("asked", "vhost", "chosen"),
    [
        (None, WORKING, (Backend.VHOST, "")),
        (None, BROKEN, (Backend.USER, "broken")),
        (Backend.USER, WORKING, (Backend.USER, "")),
        (Backend.VHOST, WORKING, (Backend.VHOST, "")),
    ],
)
def test_backend_is_the_asked_one_else_the_fast_one(
    asked: Backend | None, vhost: Verdict, chosen: tuple[Backend, str]
) -> None:
    assert probe.choose_backend(asked, vhost) == chosen


def test_vhost_that_was_asked_for_and_does_not_work_is_refused() -> None:
    with pytest.raises(HostError, match="this host cannot run the backend vhost: broken") as caught:
        probe.choose_backend(Backend.VHOST, BROKEN)
    assert "modprobe vhost_vsock" in caught.value.hint
    with pytest.raises(HostError) as caught:
        probe.choose_backend(Backend.VHOST, Verdict(False, "VSH_AF_VSOCK=deny is set"))
    assert caught.value.hint.startswith("unset VSH_AF_VSOCK")


def test_memory_the_host_has_not_is_refused() -> None:
    available_mib = probe.read_available_memory_mib()
    assert available_mib > 0
    probe.check_memory(1)
    with pytest.raises(HostError, match="asks for 99999999 MiB of memory"):
        probe.check_memory(99_999_999)
