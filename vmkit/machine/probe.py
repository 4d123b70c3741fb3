"""What this host can do, proven and not guessed: QEMU, KVM, vhost-vsock, memory.

That /dev/kvm exists proves nothing: a nested hypervisor may create a VM and then die on the first instructions of a
stock kernel. So KVM is proven by booting a kernel under it until it panics for want of a root, and the verdict is
kept for this boot of the host and this QEMU.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vmkit.architectures import ARCHITECTURES, HOST, find_package
from vmkit.errors import HostError
from vmkit.machine.launch import MIN_OPEN_FILES
from vmkit.machine.spec import Accelerator, Backend
from vmkit.machine.vhost import VhostDoor
from vmkit.run import render_command, run

QEMU = ARCHITECTURES[HOST].qemu
# `-action`, memory-backend-memfd and vhost-user-vsock-pci together: QEMU 6.0 and later.
MIN_QEMU_VERSION = (6, 0)
KVM_DEVICE = "/dev/kvm"
# A stock kernel under a working KVM panics for want of a root within a second; a slow nested one may need several.
KVM_DEADLINE_S = 10.0
# KVM on the emulated AMD processor of QEMU's TCG is slower, and still ten times faster than emulation in emulation.
EMULATED_KVM_DEADLINE_S = 60.0
KILL_DEADLINE_S = 5.0
MAX_PROBE_OUTPUT_BYTES = 1024 * 1024
# Shown in one line of `vmkit up`.
MAX_REASON_CHARACTERS = 120
VERDICT_FILE = "kvm-verdict.json"
VERSION_FILE = "qemu-version.json"
VERSION = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?")
MAX_NOTE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU on this host."""

    path: str
    version: tuple[int, int, int]

    def render_version(self) -> str:
        """`7.2.22`."""
        return ".".join(str(part) for part in self.version)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something works here, and the reason for that finding."""

    works: bool
    reason: str


def find_qemu(cache_dir: Path | None = None, name: str = QEMU) -> Qemu:
    """The QEMU on PATH; what the very same file printed as its version is remembered in cache_dir.

    Raises HostError when there is none, or one too old.
    """
    path = shutil.which(name)
    if path is None:
        hint = f"install it: sudo apt-get install {find_package(name)}"
        raise HostError(f"cannot find QEMU ({name}) on PATH", hint=hint)
    text = _read_version_text(path, None if cache_dir is None else cache_dir / _name_note(name))
    match = VERSION.search(text)
    if match is None:
        raise HostError(f"cannot tell the version of {path}", details=text)
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version < MIN_QEMU_VERSION:
        raise HostError(f"QEMU {match[0].removeprefix('version ')} is too old", hint="vmkit needs 6.0 or later")
    return Qemu(path, version)


def _name_note(name: str) -> str:
    """Each QEMU has a note of its own."""
    return VERSION_FILE if name == QEMU else f"{name}-{VERSION_FILE}"


def _read_version_text(path: str, note: Path | None) -> str:
    """`QEMU emulator version ...`; asking costs a twentieth of a second, so the answer of an unchanged file is kept."""
    status = Path(path).stat()
    key = f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    known = None if note is None else _read_note(note, key)
    if known is not None:
        return str(known.get("version", ""))
    text = run([path, "--version"], timeout_s=10.0, package=find_package(path)).decode(errors="replace")
    # An answer without a version is an error, which should not outlive its cause.
    if note is not None and VERSION.search(text):
        _write_note(note, key, {"version": text})
    return text


def probe_kvm(qemu: Qemu, kernel: Path, cache_dir: Path, *, prove: bool = True) -> Verdict:
    """Whether a stock kernel boots under KVM here; the verdict of this boot of the host is remembered in cache_dir.

    prove=False starts nothing: what is not known yet does not work yet.
    """
    refusal = check_kvm_device()
    if refusal is not None:
        return refusal
    key = f"{_read_boot_id()} {qemu.path} {qemu.render_version()}"
    known = _read_note(cache_dir / VERDICT_FILE, key)
    if known is not None:
        return Verdict(bool(known.get("works")), str(known.get("reason", "")))
    if not prove:
        return Verdict(False, "vmkit tests KVM when it starts the first machine")
    verdict = prove_kvm(qemu, kernel, EMULATED_KVM_DEADLINE_S if is_emulated() else KVM_DEADLINE_S)
    _write_note(cache_dir / VERDICT_FILE, key, asdict(verdict))
    return verdict


def check_kvm_device() -> Verdict | None:
    """Why KVM cannot even be tried, or None when it can."""
    if not Path(KVM_DEVICE).exists():
        return Verdict(False, f"this host has no {KVM_DEVICE}")
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Verdict(False, f"cannot open {KVM_DEVICE}: {os.strerror(error.errno or 0)}")
    return None


def prove_kvm(qemu: Qemu, kernel: Path, deadline_s: float = KVM_DEADLINE_S) -> Verdict:
    """Boots kernel under KVM without a root: a panic of the guest is the proof that its instructions ran."""
    argv = [
        qemu.path, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "kvm",
        "-cpu", "host", "-m", "256M", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel),
        "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip
    started_s = time.monotonic()
    output = b""
    with _start(argv) as process:
        stream = process.stdout
        while stream is not None and len(output) < MAX_PROBE_OUTPUT_BYTES:
            left_s = started_s + deadline_s - time.monotonic()
            readable, _, _ = select.select([stream], [], [], max(0.0, left_s))
            if not readable:
                return Verdict(False, f"{KVM_DEVICE} opens, but a kernel did not boot under it in {deadline_s:g} s")
            data = os.read(stream.fileno(), 65536)
            output += data
            if b"Kernel panic - not syncing" in output:
                return Verdict(True, "a kernel booted under it")
            if b"KVM internal error" in output or b"emulation failure" in output:
                return Verdict(False, f"{KVM_DEVICE} opens, but kernels die under it (KVM internal error)")
            if not data:
                break
    last = (output.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
    told = re.sub(r"^.*kvm\.c:\d+: ", "", last)
    return Verdict(False, f"QEMU fails under KVM: {told[:MAX_REASON_CHARACTERS].rstrip('.')}")


def probe_vhost(door: VhostDoor) -> Verdict:
    """Whether the kernel's vhost-vsock can be used from here."""
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        return Verdict(False, "VSH_AF_VSOCK=deny is set")
    try:
        os.close(door.open_device())
    except OSError as error:
        return Verdict(False, f"/dev/vhost-vsock: {os.strerror(error.errno or 0)}")
    return Verdict(True, "vmkit can open /dev/vhost-vsock")


def choose_accelerator(asked: Accelerator | None, kvm: Verdict | None) -> tuple[Accelerator, str]:
    """The accelerator and, when it is not the fast one nor asked for, why. kvm may be None when asked says which."""
    if asked is not None:
        return asked, ""
    if kvm is not None and kvm.works:
        return Accelerator.KVM, ""
    return Accelerator.TCG, kvm.reason if kvm is not None else "vmkit did not test KVM"


def choose_backend(asked: Backend | None, vhost: Verdict) -> tuple[Backend, str]:
    """The backend and why it is not vhost. Raises HostError when vhost was asked for and does not work here."""
    if asked is Backend.VHOST and not vhost.works:
        remedy = "unset VSH_AF_VSOCK" if "VSH_AF_VSOCK" in vhost.reason else "sudo modprobe vhost_vsock"
        raise HostError(
            f"this host cannot run the backend vhost: {vhost.reason}",
            hint=f"{remedy}, or use vmkit's own device: --backend user",
        )
    if asked is not None:
        return asked, ""
    return (Backend.VHOST, "") if vhost.works else (Backend.USER, vhost.reason)


def is_emulated(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this host is itself run by QEMU's emulator: its processor's name has QEMU in it."""
    try:
        with cpuinfo.open(errors="replace") as file:
            head = file.read(MAX_NOTE_BYTES)
    except OSError:
        return False
    return re.search(r"^model name\s*:\s*QEMU (TCG|Virtual) CPU", head, re.MULTILINE) is not None


def read_available_memory_mib() -> int:
    """MemAvailable of /proc/meminfo, in MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0


def check_memory(memory_mib: int) -> None:
    """Raises HostError when the host cannot give a guest that much."""
    available_mib = read_available_memory_mib()
    if available_mib and memory_mib > available_mib:
        raise HostError(
            f"the machine asks for {memory_mib} MiB of memory, and {available_mib} MiB are available",
            hint="give less with --memory, or stop another machine (vmkit list)",
        )


def check_open_files() -> None:
    """Raises HostError when a machine's processes could not open enough files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        raise HostError(
            f"this process may open {hard} files, and a machine needs {MIN_OPEN_FILES}",
            hint="raise the limit: ulimit -n 1024; if this shell cannot, use a new one",
        )


@contextlib.contextmanager
def _start(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output is one stream, and which is gone when the block ends."""
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        raise HostError(f"cannot start QEMU: {error.strerror}", details=render_command(argv)) from error
    try:
        yield process
    finally:
        # With whatever it has started: a QEMU on PATH may be a script.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that hangs in a broken KVM may not even die; it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _read_note(path: Path, key: str) -> dict[str, object] | None:
    """What was noted under key; None when there is nothing, or something unreadable."""
    try:
        with path.open() as file:
            value = json.loads(file.read(MAX_NOTE_BYTES))
        return value if value["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_note(path: Path, key: str, value: dict[str, object]) -> None:
    """Notes a finding; a runtime directory that cannot be written costs the next start the same question again."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({"key": key, **value}))
        temporary.replace(path)
