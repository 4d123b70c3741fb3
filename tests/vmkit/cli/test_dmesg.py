"""dmesg: of running machines and of ended ones, and what a failed start prints of the kernel's log."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Program, Vmkit
from tests.vmkit.memory.kernel_maker import BANNER_TEXT, RELEASE, KernelMaker
from tests.vsh.test_text import HOSTILE, SEEN
from vmkit.machine.running import find_machine

PANIC = b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
BANNER_LINE = f"[    0.000000] {BANNER_TEXT.decode()}\n"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelMaker]:
    """The kernel whose memory the fake QEMU has; `write_memory` gives it to the next one."""
    kernel = KernelMaker()
    kernel.log(BANNER_TEXT, level=5)
    monkeypatch.setenv("FAKE_MEMORY", str(tmp_path / "memory"))
    write_memory(kernel, tmp_path)
    yield kernel


def write_memory(kernel: KernelMaker, folder: Path) -> None:
    (folder / "memory").write_bytes(kernel.memory)


def test_dmesg_of_a_running_machine(up: Vmkit, vmkit: Vmkit, memory: KernelMaker) -> None:
    up("ready", "--name", "m")
    assert vmkit("dmesg").out == vmkit("dmesg", "m").out == BANNER_LINE
    assert vmkit("dmesg", "m", "--raw").out == f"<5>{BANNER_LINE}"
    machine = find_machine("m")
    assert [(line.level, line.text) for line in machine.dmesg()] == [("notice", BANNER_TEXT.decode())]
    assert (machine.directory / "kernel.log").stat().st_mode & 0o777 == 0o600
    assert vmkit("logs", "m", "--kind", "kernel").out == f"<5>{BANNER_LINE}"


def test_dmesg_in_json_is_for_programs(up: Vmkit, vmkit: Vmkit, memory: KernelMaker) -> None:
    up("ready", "--name", "m")
    value = json.loads(vmkit("dmesg", "m", "--json").out)
    assert value == [{"level": "notice", "facility": "kern", "time_s": 0.0, "text": BANNER_TEXT.decode()}]
    check_form("dmesg", value)


def test_text_of_a_kernel_cannot_steer_the_terminal(
    up: Vmkit, program: Program, memory: KernelMaker, tmp_path: Path
) -> None:
    memory.log(HOSTILE.replace(b"\n", b" "))
    write_memory(memory, tmp_path)
    up("ready", "--name", "m")
    shown = program("dmesg", "m").stdout.decode()
    # A return of its own ends a line there.
    assert shown.endswith(SEEN.replace("\n", "\n ", 1).replace("\nend", "\n end") + "\n")
    assert program("dmesg", "m", "--raw").stdout.endswith(HOSTILE.replace(b"\n", b" ") + b"\n")


def test_kernel_without_a_log_is_named(up: Vmkit, vmkit: Vmkit, tmp_path: Path, memory: KernelMaker) -> None:
    write_memory(KernelMaker(has_note=False), tmp_path)
    up("ready", "--name", "m")
    done = vmkit("dmesg", "m")
    brief = f"cannot read the kernel's log of 'm': the guest's kernel {RELEASE} has no log that vmkit can read"
    assert done.status == 1
    assert done.err.splitlines()[0] == f"vmkit: {brief}"
    assert "hint: vmkit reads Linux 5.10 and later" in done.err


def test_machine_without_a_kernel_is_told(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m")
    assert "the guest's memory holds no Linux kernel" in vmkit("dmesg", "m").err


def test_boot_that_hangs_prints_the_kernels_last_lines(up: Vmkit, vmkit: Vmkit, memory: KernelMaker) -> None:
    done = up("silent", "-q", "--timeout", "1")
    assert "the guest was not ready within 1 s" in done.err
    lines = done.err.splitlines()
    at = lines.index("  the kernel's last lines, from the guest's memory:")
    assert lines[at + 1] == f"  {BANNER_LINE.rstrip()}"
    assert vmkit("dmesg", "my").out == BANNER_LINE
    assert vmkit("logs", "my", "--kind", "kernel").out == f"<5>{BANNER_LINE}"


def test_lines_that_the_console_has_are_printed_once(
    up: Vmkit, vmkit: Vmkit, memory: KernelMaker, tmp_path: Path
) -> None:
    memory.log(PANIC, level=0)
    memory.log(b"CPU: 0 PID: 1 Comm: swapper/0", level=0)
    write_memory(memory, tmp_path)
    done = up("panic", "-q")
    assert "the console's last lines:" in done.err
    assert "the kernel's last lines" not in done.err
    assert PANIC.decode() in vmkit("dmesg", "my").out


def test_wait_prints_the_kernels_last_lines(up: Vmkit, vmkit: Vmkit, memory: KernelMaker) -> None:
    up("ready-then-die", "-q", "--name", "m")
    done = vmkit("wait", "m")
    assert (done.status, done.out) == (1, "m: QEMU ended with signal 9 (SIGKILL)\n")
    assert f"the kernel's last lines, from the guest's memory:\n{BANNER_LINE}" in done.err


def test_wait_in_json_has_them_too(up: Vmkit, vmkit: Vmkit, memory: KernelMaker) -> None:
    up("ready-then-die", "-q", "--name", "m")
    assert BANNER_LINE.strip() in json.loads(vmkit("wait", "m", "--json").out)["details"]


def test_machine_that_ended_without_a_kernel_log_is_told(up: Vmkit, vmkit: Vmkit) -> None:
    up("silent", "-q", "--timeout", "1")
    done = vmkit("dmesg", "my")
    assert done.err.startswith("vmkit: there is no kernel log in ")
    assert done.err.endswith("hint: see why: vmkit logs my --kind events\n")
    events = [json.loads(line) for line in vmkit("logs", "my", "--kind", "events").out.splitlines()]
    assert [event["why"] for event in events if event["event"] == "no-kernel-log"] == [
        "the guest's memory holds no Linux kernel"
    ]
    assert events[-1]["event"] == "end"


def test_dmesg_of_nobody_is_told(vmkit: Vmkit) -> None:
    assert vmkit("dmesg", "nobody").err.startswith("vmkit: there are no logs of 'nobody'")
