"""A folder of the host as the machine's root: its own files, read-only, below the guest's overlay.

virtiofsd serves it where that is safe (vmkit.machine.live_root chooses). Otherwise QEMU does, by 9p: no process beside
it, and no descriptor for each file that the guest knows.
"""

import os
from typing import TYPE_CHECKING

from vmkit.architectures import HOST
from vmkit.errors import ConfigError, HostError
from vmkit.machine.live_root import VIRTIOFS, check_image_kernel
from vmkit.machine.parts.part import (
    FRONTEND_MARK,
    Companion,
    Fitting,
    JsonObject,
    Option,
    OptionKind,
    Part,
    QmpCommand,
    render_options,
)
from vmkit.machine.spec import read_path
from vmkit.machine.virtiofsd import is_host_root, plan_view

if TYPE_CHECKING:
    from pathlib import Path

    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

# By this the guest's init finds it.
TAG = "vmkit-root"
DEVICE_ID, CHARDEV_ID, FD_NAME, ROOT_PORT_ID = "root-fs", "root-char", "root-fd", "root-port"
SOCKET = "virtiofsd.sock"
# Requests that wait at once; QEMU's own 128 are too few for a guest that lists folders.
QUEUE_SIZE = 1024
# In a namespace of a user, the kernel shows 65534 for every other owner. Most of these files are root's, and programs
# such as sudo and sshd demand that of their files.
OTHERS_ARE_ROOT = ("--translate-uid", "host:65534:0:1", "--translate-gid", "host:65534:0:1")


class SharePart(Part):
    """`root_from`: the folder."""

    name = "virtiofsd"
    log = "virtiofsd.log"
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
        check_image_kernel(spec, (*built.modules, *built.modules_available))

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"root_from": None if spec.root_from is None else str(spec.root_from)}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        folder = hardware.spec.root_from
        if folder is None:
            return ()
        if hardware.root_type == VIRTIOFS:
            # The device is plugged when virtiofsd serves it.
            return ("-device", f"pcie-root-port,id={ROOT_PORT_ID},slot=2")
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

    def plan_fitting(self, hardware: "Hardware") -> Fitting | None:
        if hardware.spec.root_from is None or hardware.root_type != VIRTIOFS:
            return None
        address: JsonObject = {"addr": {"type": "fd", "data": {"str": FD_NAME}}, "server": False}
        chardev: JsonObject = {"id": CHARDEV_ID, "backend": {"type": "socket", "data": address}}
        device: JsonObject = {
            "driver": "vhost-user-fs-pci",
            "id": DEVICE_ID,
            "bus": ROOT_PORT_ID,
            "chardev": CHARDEV_ID,
            "tag": TAG,
            "queue-size": QUEUE_SIZE,
        }
        return Fitting(
            self.name,
            plug=(QmpCommand("chardev-add", chardev), QmpCommand("device_add", device)),
            fd_name=FD_NAME,
            companion=plan_virtiofsd(hardware, hardware.spec.root_from),
        )


def plan_virtiofsd(hardware: "Hardware", folder: "Path") -> Companion:
    """virtiofsd for a folder that the guest only reads. It is this user's, in a sandbox of its own."""
    found = hardware.virtiofsd
    assert found is not None, "vmkit.machine.choose has found it"
    is_view = is_host_root(folder)
    argv: tuple[str, ...] = (
        found.program,
        "--fd", FRONTEND_MARK,
        "--shared-dir", str(hardware.directory if is_view else folder),
        "--readonly",
        "--sandbox", "namespace",
        # To the guest's overlay a mount point that is announced is a folder that it cannot enter (EREMOTE).
        "--no-announce-submounts",
        "--cache", "auto",
        "--rlimit-nofile", str(found.open_files),
        *(() if os.geteuid() == 0 else OTHERS_ARE_ROOT),
    )  # fmt: skip
    return Companion(
        # What is at the machine's directory, virtiofsd alone sees.
        plan_view(hardware.directory, argv) if is_view else argv,
        title="virtiofsd",
        kind="virtiofsd",
        log=SharePart.log,
        device=DEVICE_ID,
        serve=SOCKET,
        # Another one would not know what the guest has open.
        is_vital=True,
    )
