"""Which of the host's devices a container gets: those that are there and work, by doctor's verdict.

Pure but for the owners of device nodes. What is not passed is replaced inside: TCG for KVM, our own vsock device for
the kernel's.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmkit.machine.doctor import Check, Level

KVM = "/dev/kvm"
VHOST = ("/dev/vhost-vsock", "/dev/vsock")


@dataclass(frozen=True, slots=True)
class Passed:
    """groups: numbers of the groups, never root's, that may open the devices. vsock: the container needs vsock sockets.

    lines tell a person what was passed, and what was not and why.
    """

    devices: tuple[str, ...]
    groups: tuple[int, ...]
    vsock: bool
    lines: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """Without vhost no vsock socket is of use inside, and on a host that is a guest itself it would lead astray."""
        return {} if self.vsock else {"VSH_AF_VSOCK": "deny"}


def choose_devices(checks: Sequence[Check], *, local: bool, owners: Mapping[str, int] | None = None) -> Passed:
    """owners: the group of each device node that exists; looked up when None. local: the engine is on this host."""
    if not local:
        return Passed((), (), False, ("no devices: the engine is on another host",))
    groups = find_owners() if owners is None else owners
    by_name = {check.name: check for check in checks}
    devices: list[str] = []
    lines = []
    kvm, vhost = by_name["kvm"], by_name["vhost-vsock"]
    if KVM in groups and kvm.level is not Level.FALLBACK:
        devices.append(KVM)
        # Without QEMU on the host, doctor could not prove it; the vmkit inside does.
        lines.append(f"passed {KVM}: {kvm.text if kvm.level is Level.OK else 'to be proven inside'}")
    else:
        lines.append(f"not passed {KVM}: {kvm.text}")
    usable = vhost.level is Level.OK and by_name["af_vsock"].level is Level.OK and all(path in groups for path in VHOST)
    if usable:
        devices += VHOST
        lines.append(f"passed {' and '.join(VHOST)}: {vhost.text}")
    else:
        lines.append(f"not passed {VHOST[0]}: {vhost.text}")
    return Passed(tuple(devices), tuple(sorted({groups[path] for path in devices} - {0})), usable, tuple(lines))


def find_owners() -> dict[str, int]:
    """The group of each of the devices that exists here; 0 where none but root may open it."""
    owners = {}
    for path in (KVM, *VHOST):
        with contextlib.suppress(OSError):
            status = Path(path).stat()
            owners[path] = status.st_gid if status.st_mode & 0o060 else 0
    return owners
