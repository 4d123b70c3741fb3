"""The ways around: what a guest's user tries where no socket helps, and what root of the guest can undo.

Runs inside guests, beside attacker.py. A result is an errno's name where the kernel said no, `done` where the step
worked, `none` where there was nothing to take, else what was found.
"""

import ctypes
import errno
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.guest.wall.inside import attacker, sockaddr
else:
    import attacker
    import sockaddr

NR_PIDFD_OPEN, NR_PIDFD_GETFD, NR_BPF, NR_FINIT_MODULE, NR_PTRACE = 434, 438, 321, 313, 101
PTRACE_ATTACH = 16
# On a busy host one volley of an emulated guest alone has taken five.
DETACH_S = 30.0
BPF_PROG_LOAD, BPF_PROG_TYPE_SOCKET_FILTER = 5, 1
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, DUMP = 4, 20, 0x301
LOOPBACK = "vsock_loopback"
# Writable for all by their nature.
HARMLESS = re.compile(
    r"/(dev/(null|zero|full|random|urandom|tty|ptmx|pts/.*|shm|vsock|fuse|log|net/tun|kvm)|tmp|var/tmp|proc|sys)(/|$)"
)


def call(number: int, *words: object) -> int:
    """A system call's result. Raises OSError."""
    result: int = sockaddr.LIBC.syscall(number, *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def find_daemons() -> list[int]:
    """pid 1 and every process of vshd's, the own session's among them."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if b"vshd" in file.read():
                    pids.append(int(name))
        except OSError:
            pass
    return sorted(pids)


def find_module() -> str:
    """The path of vsock_loopback where the image ships it."""
    for folder, _, names in os.walk("/lib/modules"):
        for name in names:
            if name.startswith(LOOPBACK):
                return os.path.join(folder, name)
    return ""


def is_loopback_loaded() -> bool:
    return os.path.exists(f"/sys/module/{LOOPBACK}")


# The daemon's processes: one that lets us is enough.


def trace_daemon() -> str:
    return _on_any(lambda pid: call(NR_PTRACE, PTRACE_ATTACH, pid, 0, 0))


def write_daemon_memory() -> str:
    return _on_any(lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)))


def list_daemon_files() -> str:
    return _on_any(lambda pid: os.listdir(f"/proc/{pid}/fd"))


def read_daemon_environment() -> str:
    return _on_any(lambda pid: os.close(os.open(f"/proc/{pid}/environ", os.O_RDONLY)))


def take_daemon_descriptor() -> str:
    return _on_any(_take_descriptor)


def _take_descriptor(pid: int) -> None:
    handle = call(NR_PIDFD_OPEN, pid, 0)
    try:
        os.close(call(NR_PIDFD_GETFD, handle, 0, 0))
    finally:
        os.close(handle)


def signal_daemon() -> str:
    """Signal 0: the permission alone. The process of one's own session may be signalled."""
    return _on_any(lambda pid: os.kill(pid, 0), beside=os.getppid())


def _on_any(step: Callable[[int], object], beside: int = 0) -> str:
    refusal = "none"
    for pid in find_daemons():
        if pid == beside:
            continue
        try:
            step(pid)
            return f"done to {pid}"
        except (ProcessLookupError, FileNotFoundError):
            continue  # a session that has ended since
        except OSError as error:
            refusal = attacker.name_errno(error.errno or 0)
    return refusal


def find_leaked_descriptors() -> str:
    """What this process was given beside its standard streams."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        if int(name) > 2:
            found.append(target)
    return " ".join(found) or "none"


# The kernel.


def load_module() -> str:
    path = find_module()
    if not path:
        return "none"
    fd = os.open(path, os.O_RDONLY)
    try:
        call(NR_FINIT_MODULE, fd, b"", 0)
    finally:
        os.close(fd)
    return "done"


def autoload_module() -> str:
    """A socket of the family, a diagnosis of it, another protocol: whatever makes the kernel ask for modules."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM, socket.SOCK_RAW):
        for protocol in (0, 1):
            try:
                socket.socket(socket.AF_VSOCK, kind, protocol).close()
            except OSError:
                pass
    try:
        list_sockets()
    except OSError:
        pass
    return "done" if is_loopback_loaded() else "none"


def list_sockets() -> str:
    """vsock_diag names every vsock socket of the guest."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        request = struct.pack("=BBHIIII", socket.AF_VSOCK, 0, 0, 0xFFFFFFFF, 0, 0, 0)
        netlink.send(struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, DUMP, 1, 0) + request)
        netlink.settimeout(2)
        answer = netlink.recv(65536)
    kind = struct.unpack_from("=H", answer, 4)[0]
    if kind == 2:  # NLMSG_ERROR
        raise OSError(-struct.unpack_from("=i", answer, 16)[0], "")
    return "done" if kind == SOCK_DIAG_BY_FAMILY else "none"


def set_modprobe_path() -> str:
    fd = os.open("/proc/sys/kernel/modprobe", os.O_WRONLY)
    os.close(fd)
    return "done"


def set_modules_disabled() -> str:
    """Writable would mean that anybody could keep root from loading modules."""
    os.close(os.open("/proc/sys/kernel/modules_disabled", os.O_WRONLY))
    return "done"


def load_program() -> str:
    """A BPF program of one's own: r0 = 0; exit."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    words = struct.pack(
        "=IIQQ", BPF_PROG_TYPE_SOCKET_FILTER, 2, ctypes.addressof(program), ctypes.addressof(licence)
    ).ljust(128, b"\0")
    os.close(call(NR_BPF, BPF_PROG_LOAD, words, len(words)))
    return "done"


def find_bpf_folders() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        return [line.split()[1] for line in mounts if line.split()[2] == "bpf"]


def unpin_programs() -> str:
    """Removes every pin, which detaches what hangs on it alone."""
    result = "none"
    for folder in find_bpf_folders():
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
            result = "done"
    return result


def unmount_programs() -> str:
    result = "none"
    for folder in find_bpf_folders():
        if sockaddr.LIBC.umount2(folder.encode(), 2) != 0:
            raise OSError(ctypes.get_errno(), "")
        result = "done"
    return result


# The machine.


def open_memory() -> str:
    return _open_any("/dev/mem", "/dev/port", "/dev/kmem", "/proc/kcore")


def open_consoles() -> str:
    """A line forged there could be taken for the kernel's or init's by the host."""
    return _open_any("/dev/console", "/dev/ttyS0", "/dev/hvc0", "/dev/kmsg", "/dev/tty0", flags=os.O_WRONLY)


def open_firmware() -> str:
    """Where the machine's token would be."""
    paths = ["/sys/firmware/dmi/tables/DMI"]
    for folder in ("/sys/firmware/dmi/entries", "/sys/firmware/qemu_fw_cfg"):
        paths += [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name == "raw"]
    return _open_any(*paths)


def open_pci() -> str:
    """The vsock device's registers and rings."""
    root = "/sys/bus/pci/devices"
    paths = ["/sys/bus/pci/rescan"]
    for device in os.listdir(root):
        paths += [f"{root}/{device}/{name}" for name in ("config", "resource0", "resource4", "remove", "rescan")]
    return _open_any(*paths, flags=os.O_WRONLY)


def _open_any(*paths: str, flags: int = os.O_RDONLY) -> str:
    """`done` when one opens, the last refusal otherwise."""
    refusal = "none"
    for path in paths:
        try:
            os.close(os.open(path, flags))
            return f"done {path}"
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                refusal = attacker.name_errno(error.errno or 0)
    return refusal


def mount_over() -> str:
    """Something else in the place of /run, for everybody."""
    if sockaddr.LIBC.mount(b"none", b"/run", b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"


def find_writable() -> str:
    """Files and folders of others that this user may write to."""
    found = [path for path in _walk() if os.access(path, os.W_OK, effective_ids=True)]
    return " ".join(found[:8]) or "none"


def find_setuid() -> str:
    found = []
    for path in _walk():
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            found.append(path)
    return " ".join(found[:8]) or "none"


def _walk() -> Iterator[str]:
    yield "/"
    for folder, folders, names in os.walk("/"):
        folders[:] = [name for name in folders if not HARMLESS.match(os.path.join(folder, name))]
        for name in [*folders, *names]:
            path = os.path.join(folder, name)
            if (
                not os.path.islink(path)
                and not HARMLESS.match(path)
                and os.lstat(path).st_uid not in (attacker.USER_ID, os.getuid())
            ):
                yield path


STEPS: dict[str, Callable[[], str]] = {
    "find leaked descriptors": find_leaked_descriptors,
    "trace vshd": trace_daemon,
    "write vshd's memory": write_daemon_memory,
    "list vshd's files": list_daemon_files,
    "read vshd's environment": read_daemon_environment,
    "take vshd's descriptors": take_daemon_descriptor,
    "signal vshd": signal_daemon,
    "load vsock_loopback": load_module,
    "make the kernel load it": autoload_module,
    "list vsock sockets": list_sockets,
    "set the modprobe program": set_modprobe_path,
    "set modules_disabled": set_modules_disabled,
    "load a BPF program": load_program,
    "remove the pins": unpin_programs,
    "unmount the pins": unmount_programs,
    "open memory": open_memory,
    "open the consoles": open_consoles,
    "read the firmware's tables": open_firmware,
    "open the PCI devices": open_pci,
    "mount over /run": mount_over,
    "find writable files": find_writable,
    "find setuid programs": find_setuid,
}


def run_step(name: str) -> attacker.Attempt:
    attempt = attacker.Attempt(name, "", "", 0)
    try:
        attempt.end(STEPS[name]())
    except OSError as error:
        attempt.end(attacker.name_errno(error.errno or 0))
    return attempt


# In a mount namespace of one's own these change nothing for anybody else.
ONLY_OUTSIDE = ("mount over /run",)


def climb(who: str) -> list[attacker.Attempt]:
    return [run_step(name) for name in STEPS if who != "namespace" or name not in ONLY_OUTSIDE]


def undo(_who: str) -> list[attacker.Attempt]:
    """Root takes away what it can, then connects as anybody in the guest would."""
    names = ("load vsock_loopback", "remove the pins", "unmount the pins", "load vsock_loopback")
    attempts = [run_step(name) for name in names]
    return attempts + _connect_again()


def _connect_again() -> list[attacker.Attempt]:
    """Connects until nothing is refused: the kernel lets go of a program some time after its last reference."""
    deadline_s = time.monotonic() + DETACH_S
    while True:
        tries = [
            attacker.Attempt("connect", "stream", label, port)
            for label in ("1", "own")
            for port in (attacker.VSHD_PORT, attacker.STREAM_PORT)
        ]
        attacker.Volley(attacker.find_own_cid()).run(tries)
        if all(attempt.result != "EPERM" for attempt in tries) or time.monotonic() > deadline_s:
            return tries
        time.sleep(0.02)


ORDERS = {"climb": climb, "undo": undo}
