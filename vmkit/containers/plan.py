"""What crun is to run: from the settings of a container image, a name and a command to the documents of a container.

Pure. The facts are those of the OCI runtime specification (config.md, config-linux.md). The limits on capabilities and
system calls are like docker's: what a container of docker may not do, one of ours may not either.
"""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from vmkit.errors import ConfigError
from vmkit.roots.settings import ContainerSettings

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A shell ends at once where it has no terminal, so an image whose command is only that waits for sessions instead.
SHELLS = ("ash", "bash", "dash", "fish", "ksh", "sh", "zsh")
SHELL_OPTIONS = ("-i", "-l", "--login")
# The guest's static busybox, which needs nothing of the root. As pid 1 it reaps what sessions leave behind.
BUSYBOX = "/dev/.vmkit/busybox"
IDLE = f"trap 'exit 0' TERM INT; while :; do {BUSYBOX} sleep 86400 & wait $!; done"
# The guest's script puts the user in its place: the numbers are those of the root's files.
USER_MARK = "@user@"
# What a variable of execve(2) can have, in which a document travels: MAX_ARG_STRLEN of linux/binfmts.h.
DOCUMENT_BYTES_MAX = 127 << 10

CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "NET_RAW"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
)
# What reaches the guest's kernel itself, or other containers.
DENIED_CALLS = (
    *("_sysctl", "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module"),
    *("fanotify_init", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "init_module"),
    *("io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load"),
    *("kexec_load", "keyctl", "lookup_dcookie", "mbind", "migrate_pages", "mount", "mount_setattr", "move_mount"),
    *("move_pages", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open"),
    *("pivot_root", "process_madvise", "query_module", "quotactl", "quotactl_fd", "reboot", "request_key"),
    *("set_mempolicy", "setns", "settimeofday", "stime", "swapoff", "swapon", "sysfs", "syslog", "umount", "umount2"),
    *("unshare", "uselib", "userfaultfd", "ustat", "vhangup", "vm86", "vm86old"),
)
# linux/sched.h: CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS, NEWTIME.
NEW_NAMESPACES = (0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x00000080)
# linux/socket.h: AF_VSOCK. Over it a program of the guest reaches the host.
VSOCK_FAMILY = 40
EPERM, ENOSYS = 1, 38
# By what `uname -m` prints: the name of the architecture in images, and libseccomp's.
ARCHITECTURES = {
    "x86_64": ("amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")),
    "aarch64": ("arm64", ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")),
    "riscv64": ("riscv64", ("SCMP_ARCH_RISCV64",)),
    "s390x": ("s390x", ("SCMP_ARCH_S390X", "SCMP_ARCH_S390")),
}
MASKED = (
    *("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi"),
    *("/proc/timer_list", "/proc/timer_stats", "/sys/firmware", "/sys/devices/virtual/powercap"),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """The documents of a container, each one line of JSON or text. command: of its first process, None: it idles.

    config: crun's, with USER_MARK. process: what every process of it has alike. env: the inside of a JSON list. cwd: a
    JSON text, empty where the image names none. user: as the image has it.
    """

    command: tuple[str, ...] | None
    config: str
    process: str
    env: str
    cwd: str
    user: str


def plan_container(name: str, settings: ContainerSettings, command: Sequence[str], machine: str) -> ContainerPlan:
    """Returns the documents of a container. command: instead of the image's own. machine: as uname(1) names it.

    Raises ConfigError.
    """
    words = choose_command(settings, command)
    args = [BUSYBOX, "sh", "-c", IDLE] if words is None else list(words)
    has_path = any(text.startswith("PATH=") for text in settings.env)
    variables = settings.env if has_path else (DEFAULT_PATH, *settings.env)
    # An image's paths begin at its root, also where it does not write so.
    cwd = posixpath.join("/", settings.working_dir)
    process = {
        "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": False,
    }
    first = {
        "terminal": False,
        "user": USER_MARK,
        "args": args,
        "env": list(variables),
        "cwd": cwd,
        **process,
    }
    plan = ContainerPlan(
        words,
        json.dumps(render_config(name, first, machine)),
        json.dumps(process)[1:-1],
        json.dumps(list(variables))[1:-1],
        json.dumps(cwd) if settings.working_dir else "",
        settings.user,
    )
    for document in (plan.config, plan.env, plan.cwd, plan.user):
        if len(document) > DOCUMENT_BYTES_MAX or "\n" in document:
            raise ConfigError(
                f"the image's variables and command take more than {DOCUMENT_BYTES_MAX} bytes",
                hint="a container takes no more; make them shorter",
            )
    return plan


def choose_command(settings: ContainerSettings, command: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the first process's words; None for a container that waits for sessions."""
    if command:
        return (*settings.entrypoint, *command)
    words = (*settings.entrypoint, *settings.cmd)
    if not words:
        return None
    is_shell = posixpath.basename(words[0]) in SHELLS and all(word in SHELL_OPTIONS for word in words[1:])
    return None if is_shell else words


def render_config(name: str, process: dict[str, object], machine: str) -> dict[str, object]:
    """Returns crun's config.json. The network is the guest's own, so that the ports of a container are the guest's."""
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": "root", "readonly": False},
        "hostname": name,
        "mounts": _list_mounts(),
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")],
            "cgroupsPath": f"/vmkit/{name}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
            "seccomp": render_seccomp(machine),
        },
    }


def _list_mounts() -> list[dict[str, object]]:
    strict = ["nosuid", "noexec", "nodev"]

    def mount(kind: str, place: str, *options: str, source: str = "") -> dict[str, object]:
        return {"destination": place, "type": kind, "source": source or kind, "options": list(options)}

    return [
        mount("proc", "/proc", *strict),
        mount("tmpfs", "/dev", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("tmpfs", "/dev/shm", *strict, "mode=1777", "size=65536k", source="shm"),  # noqa: S108
        mount("mqueue", "/dev/mqueue", *strict),
        mount("sysfs", "/sys", *strict, "ro"),
        mount("cgroup", "/sys/fs/cgroup", *strict, "relatime", "ro"),
        mount("bind", BUSYBOX, "bind", "ro", "nosuid", "nodev", source="/bin/busybox"),
    ]


def render_seccomp(machine: str) -> dict[str, object]:
    """Returns the filter of system calls: all are allowed but those that docker denies, and the vsock."""
    if machine not in ARCHITECTURES:
        raise ConfigError(f"vmkit makes no containers for the architecture '{machine}'")

    def deny(names: Sequence[str], *args: dict[str, object], error: int = EPERM) -> dict[str, object]:
        rule: dict[str, object] = {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": error}
        return {**rule, "args": list(args)} if args else rule

    # On s390x the first two arguments of clone(2) are exchanged.
    flags = 1 if machine == "s390x" else 0
    vsock = {"index": 0, "value": VSOCK_FAMILY, "op": "SCMP_CMP_EQ"}
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": list(ARCHITECTURES[machine][1]),
        "syscalls": [
            deny(DENIED_CALLS),
            # A filter cannot read the flags in memory. C libraries then take clone(2).
            deny(["clone3"], error=ENOSYS),
            *(
                deny(["clone"], {"index": flags, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"})
                for flag in NEW_NAMESPACES
            ),
            # C libraries of s390x make sockets by socketcall(2), whose words are in memory. libseccomp would deny all.
            *(() if machine == "s390x" else (deny(["socket"], vsock),)),
        ],
    }
