"""Chooses the host's devices that a container gets: those that exist and work, by doctor's verdict.

Pure but for the owners of device nodes. The container replaces missing devices: TCG for KVM, our own vsock device for
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

    lines: for a person, the passed devices, and the reasons for those that were not.
    """

    devices: tuple[str, ...]
    groups: tuple[int, ...]
    vsock: bool
    lines: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """Denies vsock sockets without vhost: on a host that is a guest, they would reach that host's own host."""
        return {} if self.vsock else {"VSH_AF_VSOCK": "deny"}


def choose_devices(checks: Sequence[Check], *, local: bool, owners: Mapping[str, int] | None = None) -> Passed:
    """Chooses the devices. owners: the group of each existing device node; None: found here. local: engine is here."""
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
    """Returns the group of each device that exists here; 0 when only root may open it."""
    owners = {}
    for path in (KVM, *VHOST):
        with contextlib.suppress(OSError):
            status = Path(path).stat()
            owners[path] = status.st_gid if status.st_mode & 0o060 else 0
    return owners
