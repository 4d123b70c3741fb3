"""A folder of the host as the machine's root: its own files, read-only, below the guest's overlay.

QEMU serves it itself, by 9p: no process beside it, and no descriptor for each file that the guest knows.
"""

import os
from typing import TYPE_CHECKING

from vmkit.architectures import HOST
from vmkit.errors import ConfigError, HostError
from vmkit.machine.parts.part import Option, OptionKind, Part, render_options
from vmkit.machine.spec import read_path

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

# By this the guest's init finds it.
TAG = "vmkit-root"
# The type of such a root, as mount(8) has it, and its module.
NINE_P = "9p"


class SharePart(Part):
    """`root_from`: the folder."""

    name = "share"
    options = (
        Option(
            "root_from",
            OptionKind.PATH,
            flag="--root-from",
            metavar="DIR",
            help="Take this folder, such as /, as the root: the host's own files, which the guest cannot write.",
            read=read_path,
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.root_from is not None and (spec.root is not None or spec.source):
            raise ConfigError("--root-from excludes another root", hint="leave one of them out")
        if spec.root_from is not None and spec.architecture != HOST:
            raise ConfigError(
                f"--root-from is for machines of {HOST}, and this one is {spec.architecture}",
                hint="vmkit makes a disk of a folder: vmkit up ./FOLDER",
            )

    def check_host(self, spec: "MachineSpec") -> None:
        folder = spec.root_from
        if folder is None:
            return
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "does not exist"
            raise HostError(f"cannot take {folder} as the root: it {what}")
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            raise HostError(f"cannot take {folder} as the root: you may not read it")

    def check_image(self, spec: "MachineSpec", built: "BuiltImage") -> None:
        if spec.root_from is None:
            return
        if not built.takes_root:
            raise ConfigError(
                f"the image {built.name} has a root of its own", hint="leave the image out, or take any: vmkit up any"
            )
        is_images_kernel = spec.kernel is None and spec.tree is None
        if is_images_kernel and NINE_P not in (*built.modules, *built.modules_available):
            raise ConfigError(
                f"the kernel of the image {built.name} has no 9p, by which a guest reads a folder of the host",
                hint="give one that has: --tree DIR, or --kernel FILE with --modules DIR, such as those of this host",
            )

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"root_from": None if spec.root_from is None else str(spec.root_from)}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        folder = hardware.spec.root_from
        if folder is None:
            return ()
        served = {
            # Owners and modes are the host's own. QEMU refuses every write itself.
            "id": "root",
            "path": str(folder),
            "security_model": "none",
            "readonly": "on",
            # Files of several file systems may have one inode number.
            "multidevs": "remap",
        }
        device = f"virtio-9p-pci,fsdev=root,mount_tag={TAG}"
        return ("-fsdev", f"local,{render_options(served)}", "-device", device)
