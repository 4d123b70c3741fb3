"""A disk with what cloud-init does in a guest: its data source NoCloud, a small ISO 9660 with the label `cidata`.

vmkit makes it anew for each machine, in the machine's directory.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.errors import ConfigError, HostError
from vmkit.machine.parts.part import Option, OptionKind, Part, render_options
from vmkit.machine.source import read_head
from vmkit.machine.spec import read_path

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

FILE = "seed.iso"
SERIAL = "vmkit-seed"
# Makes the guest load the driver of the file system.
SEED_ARGUMENT = "vmkit.seed"
# cloud-init looks at no other source of data then.
CLOUD_INIT_ARGUMENT = "ds=nocloud"
LABEL = "cidata"
MAX_BYTES = 1 << 20
# What cloud-init takes for user-data of a kind: text that begins with `#`, MIME, or either compressed by gzip. It
# warns of all else in a log, and does nothing.
BEGINNINGS = (b"#", b"Content-Type:", b"MIME-Version:", b"\x1f\x8b")


class SeedPart(Part):
    """`user_data`: the file for cloud-init."""

    name = "seed"
    options = (
        Option(
            "user_data",
            OptionKind.PATH,
            flag="--user-data",
            metavar="FILE",
            help="Have cloud-init of a root of yours do what this file says: #cloud-config, or a script.",
            read=read_path,
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.user_data is None:
            return
        if spec.init == "none":
            raise ConfigError("--init none starts no cloud-init, which --user-data is for", hint="leave --init out")
        if spec.init == "auto" and spec.root_from is not None:
            raise ConfigError(
                "a root of --root-from has vmkit's init, which starts no cloud-init", hint="leave --user-data out"
            )

    def check_host(self, spec: "MachineSpec") -> None:
        if spec.user_data is not None:
            read_user_data(spec.user_data)

    def check_image(self, spec: "MachineSpec", built: "BuiltImage") -> None:
        if spec.user_data is not None and not built.takes_root:
            raise ConfigError(
                f"the image {built.name} has no cloud-init: --user-data is for a root of yours",
                hint="give the root: vmkit up PATH --user-data FILE",
            )

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        """The disk comes after all others, whose names in the guest stay as they are."""
        if hardware.spec.user_data is None:
            return ()
        blockdev = {
            "driver": "raw",
            "node-name": "seed",
            "read-only": "on",
            "file.driver": "file",
            "file.filename": str(hardware.directory / FILE),
        }
        return ("-blockdev", render_options(blockdev), "-device", f"virtio-blk-pci,drive=seed,serial={SERIAL}")

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        return () if hardware.spec.user_data is None else (SEED_ARGUMENT, CLOUD_INIT_ARGUMENT)


def read_user_data(path: Path) -> bytes:
    """The content of the file. Raises ConfigError for what cloud-init would ignore, HostError."""
    data = read_head(path, "the user-data", size=MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the user-data {path} has more than {MAX_BYTES} bytes")
    if not data.startswith(BEGINNINGS):
        raise ConfigError(
            f"cloud-init would ignore the user-data {path}: it begins with no mark of its kind",
            hint="the first line is #cloud-config for YAML, or #! and a program for a script",
        )
    return data


def render_seed(name: str, data: bytes) -> bytes:
    """The disk for the machine of that name. Other user-data is another instance to cloud-init."""
    # Most machines have no such disk.
    from vmkit.image.formats.iso9660 import render_iso9660  # noqa: PLC0415

    meta_data = {
        "instance-id": f"{name}-{hashlib.sha256(data).hexdigest()[:12]}",
        # RFC 1123 has no underscore.
        "local-hostname": name.replace("_", "-"),
    }
    # JSON is YAML.
    return render_iso9660(LABEL, {"user-data": data, "meta-data": json.dumps(meta_data).encode() + b"\n"})


def make_seed(spec: "MachineSpec", name: str, directory: Path) -> None:
    """Writes the disk into the machine's directory, for its owner alone. Raises ConfigError, HostError."""
    if spec.user_data is None:
        return
    content = render_seed(name, read_user_data(spec.user_data))
    path = directory / FILE
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123  (the descriptor was made with O_EXCL)
            file.write(content)
    except OSError as error:
        raise HostError(f"cannot write the disk for cloud-init {path}: {error.strerror}") from error
