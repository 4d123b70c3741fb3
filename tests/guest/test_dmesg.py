"""The kernel's log out of the memory of real guests: live, stopped, hung under quiet, panicked; the guest's own words.

Each guest's own `dmesg --raw` is what the log must be.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.guest.conftest import Run, run_program
from vsh.registry import find_machine, read_machines

KERNELS = {"6.12": "", "6.1": 'kernel_suite = "bookworm"\n'}
# The kernel keeps no VMCOREINFO note then, as in its first second.
WITHOUT_NOTE = "initcall_blacklist=crash_save_vmcoreinfo_init"


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "my.toml"
    path.write_text(f'extends = "tiny"\n{text}')
    return str(path)


def check_log(name: str, version: str) -> None:
    """The log is the guest's own, and each line of it that was printed before."""
    log = run_program("vmkit", "dmesg", name, "--raw").stdout
    own = run_program("vsh", "--vm_name", name, "--", "dmesg", "-r").stdout
    assert f"] Linux version {version}." in log.partition(b"\n")[0].decode()
    assert log.count(b"\n") > 100
    # The session that asks is in the guest's log by then.
    assert own.startswith(log)


@pytest.mark.parametrize("version", [pytest.param("6.1", marks=pytest.mark.slow), "6.12"])
def test_log_is_the_guests_own(up: Run, tmp_path: Path, version: str) -> None:
    done = up(write_recipe(tmp_path, KERNELS[version]), "--name", "log", "-q")
    assert done.returncode == 0, done.stderr.decode()
    check_log("log", version)


@pytest.mark.parametrize("version", [pytest.param("6.1", marks=pytest.mark.slow), "6.12"])
def test_log_is_found_without_the_kernels_note(up: Run, tmp_path: Path, version: str) -> None:
    image = write_recipe(tmp_path, KERNELS[version])
    done = up(image, "--name", "note", "-q", "--append", WITHOUT_NOTE)
    assert done.returncode == 0, done.stderr.decode()
    check_log("note", version)


def test_log_of_a_moved_kernel_with_memory_above_4_gib(up: Run, tmp_path: Path) -> None:
    """KASLR moves the kernel and its map of memory; log_buf_len= puts the ring elsewhere."""
    image = write_recipe(tmp_path, 'kernel_format = "vmlinuz"\n')
    done = up(image, "--name", "moved", "-q", "--memory", "3G", "--append", "log_buf_len=1M")
    assert done.returncode == 0, done.stderr.decode()
    check_log("moved", "6.12")


def test_log_of_a_machine_that_is_stopped(ready: str, vmkit: Run) -> None:
    entry = find_machine(name=ready)
    assert entry is not None
    qemu_pid = int(str(entry.record["qemu_pid"]))
    os.kill(qemu_pid, signal.SIGSTOP)
    try:
        done = vmkit("dmesg", ready)
    finally:
        os.kill(qemu_pid, signal.SIGCONT)
    assert b"vshd: vshd started" in done.stdout


def test_boot_that_hangs_under_quiet_explains_itself(up: Run, vmkit: Run) -> None:
    """The kernel's console is quiet, and init waits for ever."""
    done = up("--name", "hangs", "--append", "rdinit=/bin/sh", "--timeout", "20")
    assert done.returncode == 1
    _, _, kernel = done.stderr.decode().partition("the kernel's last lines, from the guest's memory:\n")
    assert "Run /bin/sh as init process" in kernel
    assert b"Run /bin/sh as init process" in vmkit("dmesg", "hangs").stdout


def test_panic_is_in_the_log_and_printed_once(up: Run, vmkit: Run) -> None:
    done = up("--name", "panics", "--append", "rdinit=/bin/false", "-q", "--timeout", "90")
    assert done.returncode == 1
    assert "the kernel's last lines" not in done.stderr.decode()
    log = vmkit("dmesg", "panics").stdout
    assert b"Linux version" in log.partition(b"\n")[0]
    assert b"Kernel panic - not syncing: Attempted to kill init!" in log
    assert not [machine for machine in read_machines() if machine.name == "panics"]
