"""A real machine in trouble: every cause is named, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest.conftest import Run, is_pools
from tests.vsh.live import wait_until
from vmkit.machine import stop
from vsh.registry import Entry, find_machine, read_machines

BIN = Path(sys.executable).parent


def entry(name: str) -> Entry:
    machine = find_machine(name=name)
    assert machine is not None
    return machine


def left_over(folders: Path) -> list[str]:
    # The first machine makes the folder.
    return [path.name for path in (folders / "runtime" / "machines").glob("*") if not is_pools(path.name)]


def start_session(name: str, *words: str, user: str = "root") -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(BIN / "vsh"), "--vm_name", name, "--user", user, "--", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def recipe(folder: Path, name: str, body: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(f'extends = "tiny"\n{body}')
    return str(path)


def test_kernel_panic_is_named_with_the_consoles_last_lines(up: Run, folders: Path) -> None:
    done = up("--append", "rdinit=/bin/false", "--timeout", "90")
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "'tiny' did not start: the guest's kernel panicked: Attempted to kill init!" in text
    assert "the console's last lines:" in text
    assert left_over(folders) == []


def test_failure_of_init_is_named(up: Run, folders: Path, tmp_path: Path) -> None:
    image = recipe(tmp_path, "broken", '[hook]\ncontent = "#!/bin/sh\\nexit 3\\n"\n')
    done = up(image)
    assert done.returncode == 1
    assert "the guest's init failed: the image's hook" in done.stderr.decode()
    assert "status 3" in done.stderr.decode()
    assert left_over(folders) == []


def test_guest_that_never_gets_ready_ends_at_the_deadline(up: Run, folders: Path, tmp_path: Path) -> None:
    image = recipe(tmp_path, "sleepy", '[hook]\ncontent = "#!/bin/sh\\nexec sleep 1000\\n"\n')
    done = up(image, "--timeout", "20")
    assert done.returncode == 1
    assert "'sleepy' did not start: the guest was not ready within 20 s" in done.stderr.decode()
    assert left_over(folders) == []


def test_ready_from_an_unprivileged_guest_user_counts_for_nothing(up: Run, tmp_path: Path) -> None:
    """The hook runs before vshd: whatever says READY then is a fake, and from a user's port it is refused."""
    script = (
        "import socket\\ns = socket.socket(socket.AF_VSOCK)\\n"
        "try:\\n    s.connect((2, 7777)); s.sendall(b'READY=1\\\\n'); s.recv(1)\\n"
        "except OSError as e: print('FAKE', e)\\n"
    )
    hook = "su user -c 'python3 -I -S /fake.py' >/dev/console 2>&1\\nexec sleep 1000"
    image = recipe(
        tmp_path,
        "faker",
        f'[files]\n"/fake.py" = {{ content = "{script}", mode = 0o644 }}\n[hook]\ncontent = "#!/bin/sh\\n{hook}\\n"\n',
    )
    done = up(image, "--timeout", "25")
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "was not ready within 25 s" in text
    assert "FAKE [Errno 104] Connection reset by peer" in text


def test_qemu_that_is_killed_while_booting_is_named(built: None, vmkit: Run, folders: Path) -> None:
    process = subprocess.Popen(
        [str(BIN / "vmkit"), "up", "--boot", "--accel", "tcg", "--name", "doomed"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline_s = time.monotonic() + 60
    pid = 0
    while not pid:
        assert time.monotonic() < deadline_s
        found = [machine for machine in read_machines() if machine.name == "doomed"]
        pid = int(str(found[0].record.get("qemu_pid", 0))) if found else 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "'doomed' did not start: QEMU ended with signal 9 (SIGKILL)" in text.decode()
    assert left_over(folders) == []


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8, 1.5])
def test_interrupt_while_booting_leaves_nothing(built: None, folders: Path, after_s: float) -> None:
    process = subprocess.Popen(
        [str(BIN / "vmkit"), "up", "--boot", "--accel", "tcg", "--name", "stopped"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    # Before that Python itself starts, which takes its time on a busy host.
    wait_until(lambda: catches(process.pid, signal.SIGTERM), "vmkit has begun")
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert text.decode().splitlines()[-1] == "vmkit: interrupted"
    assert left_over(folders) == []


def test_qemu_killed_under_a_session_ends_vsh_with_123_and_the_cause(up: Run, folders: Path) -> None:
    assert up("--name", "m").returncode == 0
    session = start_session("m", "sh", "-c", "echo here; sleep 1000")
    assert session.stdout is not None
    assert session.stdout.readline() == b"here\n"
    os.kill(int(str(entry("m").record["qemu_pid"])), signal.SIGKILL)
    _, text = session.communicate(timeout=30)
    assert session.returncode == 123
    first, *_, last = text.decode().splitlines()
    assert first == "vsh: lost the connection to machine 'm': QEMU ended with signal 9 (SIGKILL)"
    assert last == "hint: see its logs: vmkit logs m"
    deadline_s = time.monotonic() + 10
    while left_over(folders):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_panic_under_a_session_is_named_and_kept_in_the_logs(up: Run, vmkit: Run, folders: Path) -> None:
    assert up("--name", "m").returncode == 0
    waiter = subprocess.Popen([str(BIN / "vmkit"), "wait", "m"], stdout=subprocess.PIPE)
    session = start_session("m", "sh", "-c", "echo here; sleep 1; echo c > /proc/sysrq-trigger")
    _, text = session.communicate(timeout=60)
    assert session.returncode == 123
    first, second, *console, last = text.decode().splitlines()
    assert first == "vsh: lost the connection to machine 'm': the guest's kernel panicked: sysrq triggered crash"
    assert second == "  the console's last lines:"
    assert any("Call Trace" in line or "RIP:" in line for line in console), console
    assert last == "hint: see its logs: vmkit logs m"
    said, _ = waiter.communicate(timeout=30)
    assert b"kernel panicked: sysrq triggered crash" in said
    assert waiter.returncode == 1
    assert b"sysrq triggered crash" in vmkit("logs", "m").stdout
    assert left_over(folders) == []


def test_guest_that_powers_itself_off_ends_its_machine(up: Run, vsh: Run, folders: Path) -> None:
    assert up("--name", "m").returncode == 0
    waiter = subprocess.Popen([str(BIN / "vmkit"), "wait", "m"], stdout=subprocess.PIPE)
    time.sleep(0.5)
    vsh("--vm_name", "m", "--", "poweroff")
    said, _ = waiter.communicate(timeout=60)
    assert said == b"m: the guest powered off\n"
    assert waiter.returncode == 0
    assert left_over(folders) == []


def test_device_process_that_dies_is_replaced_under_the_guest(up: Run, vsh: Run) -> None:
    assert up("--name", "m").returncode == 0
    events_path = Path(entry("m").directory) / "events.jsonl"
    device = next(json.loads(line)["pid"] for line in events_path.read_text().splitlines() if "device-started" in line)
    os.kill(device, signal.SIGKILL)
    deadline_s = time.monotonic() + 30
    while "device-replaced" not in events_path.read_text():
        assert time.monotonic() < deadline_s, events_path.read_text()
        time.sleep(0.05)
    assert vsh("--vm_name", "m", "--", "echo", "again").stdout == b"again\n"


def test_monitor_killed_takes_qemu_with_it_and_the_next_up_works(up: Run, vsh: Run) -> None:
    assert up("--name", "m", "--cid", "50").returncode == 0
    machine = entry("m")
    os.kill(machine.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{machine.record['qemu_pid']}/exe").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert up("--name", "m", "--cid", "50").returncode == 0
    assert vsh("--cid", "50", "--", "true").returncode == 0


OWNER = """
import os, sys, vmkit
with vmkit.Machine("tiny", name="owned", accelerator="tcg") as machine:
    print(machine.run(["uname"]).stdout.decode(), end="", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_owner_killed_in_its_with_block_takes_the_machine_along(built: None, folders: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, check=False, timeout=180)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"Linux\n")
    deadline_s = time.monotonic() + 30
    while "owned" in left_over(folders):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_two_ups_at_once_both_succeed(built: None, vsh: Run) -> None:
    words = [str(BIN / "vmkit"), "up", "--accel", "tcg", "--json"]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    machines = [json.loads(process.communicate(timeout=180)[0]) for process in processes]
    try:
        assert len({machine["cid"] for machine in machines}) == 2
        assert len({machine["name"] for machine in machines}) == 2
        for machine in machines:
            assert vsh("--cid", str(machine["cid"]), "--", "echo", "ok").stdout == b"ok\n"
    finally:
        for machine in machines:
            stop.kill(entry(machine["name"]))


def test_machine_without_a_name_is_refused_with_the_names_there_are(ready: str, vmkit: Run, vsh: Run) -> None:
    done = vmkit("down", "nobody")
    assert done.returncode == 1
    assert b"no machine named 'nobody' is running" in done.stderr
    assert ready.encode() in done.stderr
    done = vsh("--vm_name", "nobody", "--", "true")
    assert done.returncode == 1
    assert ready.encode() in done.stderr
