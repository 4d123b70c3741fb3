"""What is said about the end of a machine, for everything that can have been seen of it."""

import signal

import pytest

from vmkit.machine.parts.disk import IN_USE
from vmkit.monitor.console import ConsoleTrouble, Trouble, find_trouble
from vmkit.monitor.end import QemuExit, explain_exit

LOCKED = """qemu-system-x86_64: -blockdev {...}: Failed to get shared "write" lock
Is another process using the image [/srv/a b.img]?
"""
PANIC = ConsoleTrouble(Trouble.PANIC, "VFS: no root")


@pytest.mark.parametrize(
    ("reason", "trouble", "ready", "asked", "end", "expected"),
    [
        ("guest-shutdown", None, True, False, "power-off", True),
        ("guest-shutdown", None, False, False, "power-off", False),
        ("guest-shutdown", None, False, True, "power-off", True),
        ("guest-reset", PANIC, False, False, "panic", False),
        ("guest-reset", PANIC, True, False, "panic", False),
        ("guest-reset", None, True, False, "reset", True),
        ("guest-reset", None, False, False, "reset", False),
        ("guest-panic", None, True, False, "panic", False),
        ("host-qmp-quit", None, True, False, "quit", True),
        ("", None, True, False, "qemu-exit", False),
        ("", None, True, True, "killed", True),
        ("host-signal", None, True, False, "qemu-exit", False),
    ],
)
def test_end_is_explained(
    reason: str, trouble: ConsoleTrouble | None, ready: bool, asked: bool, end: str, expected: bool
) -> None:
    told = explain_exit(QemuExit("status 1", 1, reason, "words"), trouble, ready=ready, asked=asked)
    assert (told.reason, told.expected) == (end, expected)
    assert told.brief


@pytest.mark.parametrize(
    ("reason", "ready", "asked", "end", "expected"),
    [
        ("guest-shutdown", True, False, "power-off", False),
        ("guest-shutdown", True, True, "power-off", True),
        ("guest-shutdown", False, False, "init-error", False),
        ("guest-reset", True, False, "init-error", False),
    ],
)
def test_error_of_init_decides_what_a_power_off_was(
    reason: str, ready: bool, asked: bool, end: str, expected: bool
) -> None:
    error = ConsoleTrouble(Trouble.INIT_ERROR, "vshd ended 11 times")
    told = explain_exit(QemuExit("status 0", 0, reason, ""), error, ready=ready, asked=asked, init_error=error)
    assert (told.reason, told.expected) == (end, expected)
    assert ("vshd ended 11 times" in told.brief) == (not asked)


@pytest.mark.parametrize(
    ("output", "brief", "hint"),
    [
        ("qemu-system-x86_64: unable to find CPU model 'x y'", "QEMU has no CPU model 'x y'", "-cpu help"),
        ("qemu: ../kvm.c:3183: kvm_buf_set_msrs: Assertion `ret' failed.", "KVM of this host", "--accel tcg"),
        ("qemu: error: failed to set MSR 0x10a to 0x69", "KVM of this host", "--accel tcg"),
    ],
)
def test_known_error_of_qemu_has_a_hint(output: str, brief: str, hint: str) -> None:
    told = explain_exit(QemuExit("signal 6", -6, "", output), None, ready=False, asked=False)
    assert (brief in told.brief, hint in told.hint, told.details) == (True, True, output)


def test_panic_in_the_console_of_a_guest_that_powers_off_changes_nothing() -> None:
    """Everybody in the guest whose words reach its console can write such a line."""
    told = explain_exit(QemuExit("status 0", 0, "guest-shutdown", ""), PANIC, ready=True, asked=False)
    assert (told.reason, told.expected) == ("power-off", True)


def test_console_line_of_a_panic_is_found() -> None:
    line = b"[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r"
    assert find_trouble(line) == ConsoleTrouble(Trouble.PANIC, "VFS: Unable to mount root fs on unknown-block(0,0)")


def test_console_line_of_inits_failure_is_found() -> None:
    assert find_trouble(b"vmkit-init: error: cannot mount /dev\r") == ConsoleTrouble(
        Trouble.INIT_ERROR, "cannot mount /dev"
    )


def test_console_line_of_an_ordinary_boot_says_nothing() -> None:
    assert find_trouble(b"[    0.0] Command line: console=ttyS0 panic=-1") is None


def test_disk_that_another_has_is_named() -> None:
    end = explain_exit(QemuExit("status 1", 1, "", LOCKED), None, ready=False, asked=False, known=(IN_USE,))
    assert (end.reason, end.brief) == ("disk-in-use", "the disk /srv/a b.img is in use by another machine or program")
    assert LOCKED in end.details


def test_qemu_that_met_the_limit_of_a_files_size_is_explained() -> None:
    exit_ = QemuExit("signal 25 (SIGXFSZ)", -signal.SIGXFSZ, "", "")
    end = explain_exit(exit_, None, ready=False, asked=False)
    assert (end.reason, end.expected) == ("limit", False)
    assert "ulimit -f unlimited" in end.hint
