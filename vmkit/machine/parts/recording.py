"""A folder of the host into which vsh records its sessions of a machine. The guest has nothing of it."""

import os
from typing import TYPE_CHECKING

from vmkit.errors import HostError
from vmkit.machine.parts.part import Option, OptionKind, Part
from vmkit.machine.spec import read_path

if TYPE_CHECKING:
    from vmkit.machine.spec import MachineSpec


class RecordingPart(Part):
    """`record`: the folder. vsh finds it in the machine's record, and makes the folder for its first recording."""

    name = "recording"
    options = (
        Option(
            "record",
            OptionKind.PATH,
            flag="--record",
            metavar="DIR",
            help="Have every vsh record its sessions of this machine into a new file in DIR.",
            read=read_path,
            is_python=True,
        ),
    )

    def check_host(self, spec: "MachineSpec") -> None:
        """A folder that vsh cannot write to is an error of `up`, and not one of each later session."""
        if spec.record is None:
            return
        if spec.record.exists() and not spec.record.is_dir():
            raise HostError(f"cannot record into {spec.record}: it is not a directory")
        place = spec.record if spec.record.exists() else spec.record.parent
        if not place.is_dir():
            raise HostError(f"cannot record into {spec.record}: {place} is not a directory", hint="make it first")
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise HostError(f"cannot record into {spec.record}: you may not write to {place}")

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"recordings": None if spec.record is None else str(spec.record)}
