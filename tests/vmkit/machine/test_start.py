"""A start with a QEMU that plays a scenario: ready, every way to fail, every way to be interrupted; nothing is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.descriptors import read_descriptors
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import probe, stop
from vmkit.machine.choose import choose
from vmkit.machine.registry import find_state_directory
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import Started
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.machine.words import Save
from vsh.registry import find_machine, read_machines

Boot = Callable[..., Started]


def entries(root: Path) -> list[str]:
    folder = root / "runtime" / "machines"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        # The second: it went between open() and read().
        return False
    return state != "Z"


def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the deadline passed"
        time.sleep(0.01)


def test_start_returns_when_the_guest_says_ready(boot: Boot, folders: Path) -> None:
    started = boot("ready")
    assert (started.name, started.cid) == ("tiny", 3)
    machine = find_machine(cid=3)
    assert machine is not None
    assert machine.state == "ready"
    assert machine.vsock == str(folders / "runtime/machines/tiny/vsock.sock")
    assert Path(machine.vsock).stat().st_mode & 0o777 == 0o600
    assert Path(machine.directory).stat().st_mode & 0o777 == 0o700


def test_children_have_nothing_of_the_monitors(boot: Boot, folders: Path) -> None:
    """Not its lock, nor its logs, nor the sockets it listens on, but for the device's two."""
    started = boot("ready")
    entry = find_machine(name="tiny")
    assert entry is not None
    device = next(
        json.loads(line)["pid"]
        for line in (started.directory / "events.jsonl").read_text().splitlines()
        if "device-started" in line
    )
    monitor = open_files(entry.pid)
    assert str(started.directory / "lock") in monitor
    for pid, shared in ((int(str(entry.record["qemu_pid"])), 0), (device, 2)):
        files = open_files(pid)
        assert not any(name.startswith(str(folders)) for name in files), files
        # Output goes through a pipe that both ends have; of sockets, those of host programs and of `vmkit vsock`.
        common = [name for name in files & monitor if name.startswith("socket:")]
        assert len(common) == shared, common


def open_files(pid: int) -> set[str]:
    return {file for _, file in read_descriptors(pid)}


def test_second_start_takes_the_next_name_and_cid(boot: Boot) -> None:
    boot("ready")
    second = boot("ready")
    assert (second.name, second.cid) == ("tiny-2", 4)


@pytest.mark.parametrize(
    ("scenario", "said", "detail"),
    [
        ("panic", "the guest's kernel panicked: VFS: Unable to mount root fs", "Comm: swapper/0"),
        ("init-error", "the guest's init failed: cannot mount /dev", "vmkit-init: error"),
        ("power-off", "the guest powered off before it was ready", ""),
        ("exit", "QEMU ended with status 3", "something went wrong"),
        ("exit-at-once", "QEMU ended with status 1", "Cannot allocate memory"),
        ("internal-error", "QEMU stopped the guest with an internal error", "KVM internal error"),
        ("flood-the-ready-port", "'tiny' did not start: the guest floods the ready port", ""),
        ("refuse-device", "QEMU refused 'device_add': no such device here", ""),
        ("hang-up-on-the-device", "the vsock device ended with status", ""),
    ],
)
def test_start_says_why_it_failed(boot: Boot, folders: Path, scenario: str, said: str, detail: str) -> None:
    with pytest.raises(MachineError) as caught:
        boot(scenario)
    assert said in caught.value.brief
    assert detail in caught.value.details
    assert "vmkit logs tiny" in caught.value.hint or "accel" in caught.value.hint
    assert entries(folders) == []
    kept = find_state_directory() / "tiny"
    events = [json.loads(line) for line in (kept / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end"
    assert (kept / "monitor.log").read_text() == ""
    assert (kept / "argv.txt").read_text().startswith(str(Path(__file__).parents[2] / "fakes"))


def test_disk_that_takes_no_data_ends_a_start(boot: Boot, folders: Path) -> None:
    with pytest.raises(
        MachineError, match="cannot write what the guest writes: No space left on device, before"
    ) as caught:
        boot("full-disk")
    assert "make room" in caught.value.hint
    assert entries(folders) == []


def test_start_ends_at_the_deadline(boot: Boot, folders: Path) -> None:
    with pytest.raises(MachineError, match="not ready within") as caught:
        boot("silent", timeout_s=2.0)
    assert "waiting for nothing" in caught.value.details
    assert entries(folders) == []


def test_name_in_use_is_refused_and_the_machine_goes_on(boot: Boot) -> None:
    boot("ready")
    with pytest.raises(MachineError, match="a machine named 'tiny' is running"):
        boot("ready", name="tiny")
    assert find_machine(name="tiny") is not None


def test_cid_in_use_is_refused_and_its_owner_named(boot: Boot) -> None:
    boot("ready", cid=77)
    with pytest.raises(MachineError, match="CID 77 is in use by the machine 'tiny'"):
        boot("ready", name="other", cid=77)


def test_two_starts_at_once_get_different_names_and_cids(boot: Boot) -> None:
    threads = [threading.Thread(target=boot, args=("ready",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    machines = read_machines()
    assert sorted(machine.cid for machine in machines) == [3, 4, 5, 6]
    assert sorted(machine.name for machine in machines) == ["tiny", "tiny-2", "tiny-3", "tiny-4"]


def test_unreadable_kernel_is_refused(boot: Boot, folders: Path) -> None:
    with pytest.raises(HostError, match="cannot read the kernel /nowhere/vmlinuz"):
        boot("ready", kernel=Path("/nowhere/vmlinuz"))
    assert entries(folders) == []


def test_memory_the_host_has_not_is_refused(boot: Boot) -> None:
    with pytest.raises(HostError, match="asks for 99999999 MiB of memory"):
        boot("ready", memory_mib=99999999)


def test_vhost_that_was_asked_for_and_is_not_there_is_refused(boot: Boot) -> None:
    with pytest.raises(HostError, match="this host cannot run the backend vhost"):
        boot("ready", backend=Backend.VHOST)


def test_guest_that_floods_the_ready_port_is_cut_off_and_named(boot: Boot, folders: Path) -> None:
    with pytest.raises(MachineError, match="'tiny' did not start: the guest floods the ready port") as caught:
        boot("flood-ready")
    assert "vmkit logs tiny" in caught.value.hint
    assert entries(folders) == []


def test_missing_qemu_is_told_with_the_package(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="cannot find QEMU") as caught:
        boot("ready")
    assert "apt-get install qemu-system-x86" in caught.value.hint


def test_kill_leaves_nothing(boot: Boot, folders: Path) -> None:
    boot("ready")
    machine = find_machine(name="tiny")
    assert machine is not None
    qemu = int(str(machine.record["qemu_pid"]))
    stop.kill(machine)
    assert entries(folders) == []
    assert not is_alive(qemu)


def test_killed_monitor_takes_qemu_and_the_device_with_it_and_blocks_nothing(boot: Boot, folders: Path) -> None:
    started = boot("ready")
    machine = find_machine(name="tiny")
    assert machine is not None
    qemu = int(str(machine.record["qemu_pid"]))
    events = (Path(machine.directory) / "events.jsonl").read_text().splitlines()
    device = next(json.loads(line)["pid"] for line in events if "device-started" in line)
    os.kill(machine.pid, signal.SIGKILL)
    started.monitor.wait(10)
    until(lambda: not is_alive(qemu) and not is_alive(device))
    assert read_machines() == []
    again = boot("ready")
    assert (again.name, again.cid) == ("tiny", 3)


def test_stale_entry_of_a_crashed_host_is_swept(boot: Boot, folders: Path) -> None:
    stale = folders / "runtime" / "machines" / "tiny"
    stale.mkdir(parents=True, mode=0o700)
    (stale / "lock").write_bytes(b"")
    (stale / "machine.json").write_text(json.dumps({"schema": 1, "name": "tiny", "cid": 3, "state": "ready", "pid": 1}))
    started = boot("ready")
    assert (started.name, started.cid) == ("tiny", 3)


def test_panic_after_ready_is_kept_as_evidence(boot: Boot, folders: Path) -> None:
    started = boot("ready-then-panic")
    assert started.monitor.wait(10) == 1
    events = (find_state_directory() / "tiny" / "events.jsonl").read_text()
    assert '"event": "panic"' in events
    assert entries(folders) == []


def test_power_off_by_the_guest_is_an_expected_end(boot: Boot, folders: Path) -> None:
    started = boot("ready-then-power-off")
    assert started.monitor.wait(10) == 0
    assert entries(folders) == []
    assert not (find_state_directory() / "tiny").exists()


def test_power_off_after_an_error_of_init_is_no_expected_end(boot: Boot, folders: Path) -> None:
    started = boot("ready-then-init-error")
    assert started.monitor.wait(10) == 1
    kept = find_state_directory() / "tiny"
    end = json.loads((kept / "events.jsonl").read_text().splitlines()[-1])
    assert end["brief"] == "the guest powered off after its init reported: vshd ended 2 times"
    assert b"vshd ended 1 times" in (kept / "console.log").read_bytes()


def test_logs_with_an_error_of_init_are_kept_whatever_the_end(boot: Boot, folders: Path) -> None:
    started = boot("ready-then-init-error-and-no-end")
    until(lambda: b"ended 2 times" in (started.directory / "console.log").read_bytes())
    machine = find_machine(name="tiny")
    assert machine is not None
    stop.kill(machine)
    assert b"ended 2 times" in (find_state_directory() / "tiny" / "console.log").read_bytes()


def test_wait_tells_how_qemu_died(boot: Boot) -> None:
    boot("ready-then-die")
    machine = find_machine(name="tiny")
    assert machine is not None
    ended = stop.wait_for_end(machine, 10.0)
    assert ended is not None
    assert ended.brief == "QEMU ended with signal 9 (SIGKILL)"
    assert not ended.expected


def test_guest_that_ignores_power_off_is_ended(boot: Boot, folders: Path) -> None:
    boot("ignore-power-off")
    machine = find_machine(name="tiny")
    assert machine is not None
    said: list[str] = []
    stop.power_off(machine, timeout_s=0.3, tell=said.append)
    assert entries(folders) == []
    assert any("did not power off" in line for line in said)


INTERRUPTED = """
import signal, sys
from pathlib import Path
from vmkit.image.build import BuiltImage
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import start_machine
cache = Path(sys.argv[1])
image = BuiltImage("tiny", cache / "k", cache / "k", cache / "k", (), "root", "0" * 64, True)
def tell(text, fraction):
    print(text, flush=True)
spec = MachineSpec(append="fake=" + sys.argv[2], accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=30)
try:
    start_machine(spec, tell=tell, build=lambda i, t: image)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


DAEMON = """
import os, sys, traceback
from pathlib import Path
from vmkit.image.build import BuiltImage
from vmkit.machine import machine as machine_module
from vmkit.machine.start import start_machine
cache = Path(sys.argv[1])
image = BuiltImage("tiny", cache / "k", cache / "k", cache / "k", (), "root", "0" * 64, True)
machine_module.start_machine = lambda *w, **k: start_machine(*w, **k, build=lambda i, t: image)
for fd in map(int, sys.argv[2]):
    os.close(fd)
try:
    with machine_module.Machine("tiny", accelerator="tcg", backend="user", append="fake=ready") as machine:
        (cache / "result").write_text(f"{machine.name} {sorted(os.listdir('/proc/self/fd'))[0]}")
except BaseException:
    (cache / "result").write_text(traceback.format_exc())
"""


@pytest.mark.parametrize("closed", ["", "0", "1", "2", "01", "012"])
def test_machine_of_a_daemon_that_has_closed_its_standard_streams(fake_qemu: Path, closed: str) -> None:
    """Our sockets and files get the numbers 0 to 2 there; the children's standard streams must not overwrite them."""
    (fake_qemu / "cache" / "k").write_bytes(b"")
    subprocess.run([sys.executable, "-c", DAEMON, str(fake_qemu / "cache"), closed], timeout=60, check=True)
    assert (fake_qemu / "cache" / "result").read_text().startswith("tiny ")
    assert read_machines() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("stage", "scenario"),
    [("starting QEMU", "silent"), ("plugging the vsock device", "mute-qmp"), ("booting", "silent")],
)
def test_interrupt_at_every_stage_leaves_nothing(
    fake_qemu: Path, stage: str, scenario: str, number: signal.Signals
) -> None:
    (fake_qemu / "cache" / "k").write_bytes(b"")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(fake_qemu / "cache"), scenario],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == stage:
                break
        process.send_signal(number)
        rest = process.stdout.read()
    if number is signal.SIGINT:
        assert "interrupted" in rest
        assert entries(fake_qemu) == []
    # A killed `up` cannot clean up; its monitor does, and what neither could is swept by the next.
    until(lambda: read_machines() == [])


@pytest.mark.parametrize(
    ("scenario", "accelerator", "reason"),
    [
        ("works", Accelerator.KVM, ""),
        ("dies", Accelerator.TCG, "KVM internal error"),
        ("refuses", Accelerator.TCG, "failed to initialize kvm"),
    ],
)
def test_accelerator_auto_is_the_proven_one(
    image: BuiltImage, monkeypatch: pytest.MonkeyPatch, scenario: str, accelerator: Accelerator, reason: str
) -> None:
    monkeypatch.setattr(probe, "KVM_DEVICE", "/dev/null")
    monkeypatch.setenv("FAKE_KVM", scenario)
    choices = choose(MachineSpec(), lambda _text, _fraction: None, KernelVhostDoor(), lambda _image, _tell: image)
    assert choices.accelerator is accelerator
    assert reason in choices.accelerator_reason


def test_memory_that_image_and_kernel_do_not_boot_in_is_refused(image: BuiltImage) -> None:
    """Before QEMU, in which the guest would deadlock."""
    with image.initrd.open("wb") as initrd:
        initrd.write(b"070701")
        initrd.truncate(100 << 20)
    spec = MachineSpec(memory_mib=300)
    with pytest.raises(ConfigError, match="for this kernel and initramfs, not 300") as caught:
        choose(spec, lambda _text, _fraction: None, KernelVhostDoor(), lambda _image, _tell: image)
    assert caught.value.hint == "at least 310"


def test_ready_that_comes_too_late_is_no_success(boot: Boot, folders: Path) -> None:
    """The deadline has passed, QEMU is being ended, and says READY with its last breath."""
    with pytest.raises(MachineError, match="the guest was not ready within 1 s"):
        boot("ready-when-terminated", timeout_s=1.0)
    assert entries(folders) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import start_machine
from vsh.errors import VshError
from vsh.registry import find_machine
kernel = Path(sys.argv[1])
image = BuiltImage("tiny", kernel, kernel, kernel, (), "root", "0" * 64, True)
spec = MachineSpec(append="fake=ready", accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=30)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    start_machine(spec, build=lambda i, t: image)
    print(find_machine(name="tiny").state)
    stop.kill(find_machine(name="tiny"))
except VshError as error:
    print(error.brief)
"""


@pytest.mark.parametrize(
    ("room_bytes", "said"),
    [(300, "ready"), (-6, "'tiny' did not start: "), (-10_000, "cannot write to the runtime dir")],
)
def test_full_disk_costs_logs_or_the_start_and_is_told(
    boot: Boot, image: BuiltImage, folders: Path, room_bytes: int, said: str
) -> None:
    """A limit to the size of files meets everything as a full disk does.

    room_bytes is what it leaves behind the record of a machine that is ready; the first one of a start lacks the number
    of the QEMU process, and is some 16 bytes shorter.
    """
    machine = boot("ready")
    limit_bytes = max(0, (machine.directory / "machine.json").stat().st_size + room_bytes)
    stop.kill(read_machines()[0])
    argv = [sys.executable, "-c", FULL_DISK, str(image.kernel), str(limit_bytes)]
    # A .pyc file that the limit cuts short would break every later process of this checkout.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert entries(folders) == []


def test_machine_that_its_starter_does_not_own_cannot_be_saved(boot: Boot, tmp_path: Path) -> None:
    """A save would end the user's sessions."""
    boot("ready")
    entry = find_machine(name="tiny")
    assert entry is not None
    with stop.open_control(entry) as control:
        answer = control.ask(Save(str(tmp_path)))
    assert not answer.ok and answer.error == "this machine cannot be saved"
    assert find_machine(name="tiny") is not None
