"""The init of a root that its user gave: the root's own systemd, or vmkit's.

The guest sees whether the root has systemd, once it is mounted. The host says what is wanted, and keeps systemd from
waiting for what such a machine does not have.
"""

from typing import TYPE_CHECKING

from vmkit.errors import ConfigError
from vmkit.machine.parts.part import Option, OptionKind, Part
from vmkit.machine.spec import INITS

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

AUTO, SYSTEMD, NONE = INITS
# vshd.pid1.system reads it. The recipe's `init` is behind it.
INIT_ARGUMENT = "vmkit.init="
# kernel-command-line(7). The root is an overlay: the disk that /etc/fstab has for it, and its neighbours, may not be
# there, and systemd waits 90 seconds for each. Fedora's first boot asks questions on the console.
SYSTEMD_WORDS = ("fstab=no", "systemd.firstboot=no")
# By it a user has /etc/fstab read after all. It is behind ours.
OWN_FSTAB = "fstab="
# It reads that file in spite of the word, on a disk with a GPT. It fails where the line for / names another disk.
REMOUNT = "systemd-remount-fs.service"
# It looks for a source of its data for minutes.
NO_CLOUD_INIT = "cloud-init=disabled"
# Each waits up to two minutes for a network.
WAITERS = ("systemd-networkd-wait-online.service", "NetworkManager-wait-online.service")


class SystemPart(Part):
    """`init`: which program is pid 1."""

    name = "pid1"
    options = (
        Option(
            "init",
            OptionKind.CHOICE,
            AUTO,
            flag="--init",
            help="pid 1 of a root of yours: its systemd, or vmkit's init (none). auto prefers systemd.",
            words=INITS,
            shows_default=True,
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.init not in INITS:
            raise ConfigError(f"--init must be one of {', '.join(INITS)}, not '{spec.init}'")

    def check_image(self, spec: "MachineSpec", built: "BuiltImage") -> None:
        if spec.init != AUTO and not built.takes_root:
            raise ConfigError(
                f"the image {built.name} has an init of its own: --init is for a root of yours",
                hint="leave --init out, or give a root: vmkit up PATH",
            )

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        if not hardware.root_type:
            return ()
        init = hardware.spec.init
        if init == AUTO and hardware.spec.root_from is not None:
            # The services of a running host are its own: a second mail server would send its queue again.
            init = NONE
        words = () if init == AUTO else (f"{INIT_ARGUMENT}{init}",)
        if init == NONE:
            return words
        waiters = WAITERS if hardware.spec.netdev is None else ()
        has_own_fstab = any(word.startswith(OWN_FSTAB) for word in hardware.spec.append.split())
        masked = waiters if has_own_fstab else (*waiters, REMOUNT)
        cloud_init = (NO_CLOUD_INIT,) if hardware.spec.user_data is None else ()
        return (*words, *SYSTEMD_WORDS, *cloud_init, *(f"systemd.mask={unit}" for unit in masked))
