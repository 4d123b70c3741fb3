"""A recipe's `[wall]`: which layers keep everyone in the guest but vshd's host away from vshd, as a value.

Pure. What the layers are and what each stops is in docs/explanation/architecture.md, "The wall";
docs/reference/recipes.md has a row per key.
"""

from dataclasses import dataclass
from enum import StrEnum

LOOPBACK_MODULE = "vsock_loopback"
MODPROBE_RULE_PATH = "etc/modprobe.d/vmkit-wall.conf"
# modprobe.d(5): `blacklist` is about aliases, by which the kernel asks (net-pf-40), `install` about the name.
MODPROBE_RULE = f"blacklist {LOOPBACK_MODULE}\ninstall {LOOPBACK_MODULE} /bin/false\n"
# Each is two instructions of a program that runs at every connect; a host of nested VMs has a handful.
CONNECT_CIDS_LIMIT = 64
# linux/vm_sockets.h: VMADDR_CID_LOCAL, VMADDR_CID_HOST, VMADDR_CID_ANY.
CID_LOCAL, CID_HOST, CID_ANY = 1, 2, 0xFFFFFFFF


class KernelLayer(StrEnum):
    """ON: where the kernel can; REQUIRED: a guest without it does not come up."""

    OFF = "off"
    ON = "on"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class WallSpec:
    """The layers of one image.

    connect_cids: the CIDs, besides the host's, that guest processes may connect to while the kernel layer is on.
    """

    transport: bool = True
    daemon: bool = True
    kernel: KernelLayer = KernelLayer.ON
    lock_modules: bool = False
    connect_cids: tuple[int, ...] = ()
    legacy_clients: bool = False


WALL_KEYS = tuple(WallSpec.__dataclass_fields__)


def plan_init_words(
    wall: WallSpec, hook: str, system: str = "", kernel_trouble: str = "", services: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The words that /init passes to vshd.pid1.init: its duties (vshd.pid1.duties), and vshd's flags of the wall.

    system: the recipe's `init`, for a root that may have one of its own. services: programs to start beside vshd.
    kernel_trouble: why the image lacks the kernel layer, where the guest cannot find that out itself.
    """
    layers = {"transport": wall.transport, "daemon": wall.daemon, "kernel": wall.kernel is not KernelLayer.OFF}
    words = [f"--init_hook={hook}"] if hook else []
    words += [f"--init_wall={','.join(name for name, is_on in layers.items() if is_on)}"]
    words += [f"--init_no_kernel={kernel_trouble}"] if kernel_trouble else []
    words += ["--init_require_kernel"] if wall.kernel is KernelLayer.REQUIRED else []
    words += ["--init_lock_modules"] if wall.lock_modules else []
    words += [f"--init_system={system}"] if system else []
    words += [f"--init_service={program}" for program in services]
    words += [] if wall.daemon else ["--allow_cid=any"]
    words += ["--allow_legacy_clients"] if wall.legacy_clients else []
    return tuple(words)
