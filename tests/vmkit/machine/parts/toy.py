"""A part that no machine needs: one file and one row, and yet it goes the whole way from an option to a process."""

import sys

from vmkit.errors import ConfigError
from vmkit.machine.hardware import Hardware
from vmkit.machine.parts.part import FRONTEND_MARK, Companion, Fitting, Option, OptionKind, Part, QmpCommand
from vmkit.machine.spec import MachineSpec

# Prints its colour, and lives as long as its connection to QEMU.
PROGRAM = """
import socket, sys
print("a", sys.argv[2], "toy", flush=True)
socket.socket(fileno=int(sys.argv[1])).recv(1)
"""


class ToyPart(Part):
    """`toy`: its colour."""

    name = "toy"
    log = "toy.log"
    options = (Option("toy", OptionKind.TEXT, flag="--toy", metavar="COLOUR", help="Wind up a toy of this colour."),)

    def check(self, spec: MachineSpec) -> None:
        if spec.find_more("toy") == "grey":
            raise ConfigError("no toy is grey", hint="choose a colour")

    def plan_record(self, spec: MachineSpec) -> dict[str, object]:
        return {"toy": spec.find_more("toy")}

    def plan_argv(self, hardware: Hardware) -> tuple[str, ...]:
        return () if hardware.spec.find_more("toy") is None else ("-object", "toy-box,id=box")

    def plan_words(self, hardware: Hardware) -> tuple[str, ...]:
        colour = hardware.spec.find_more("toy")
        return () if colour is None else (f"toy.colour={colour}",)

    def plan_fitting(self, hardware: Hardware) -> Fitting | None:
        colour = hardware.spec.find_more("toy")
        if colour is None:
            return None
        return Fitting(
            self.name,
            plug=(QmpCommand("device_add", {"driver": "vhost-user-toy-pci", "id": "toy0"}),),
            fd_name="toy-fd",
            companion=Companion(
                (sys.executable, "-c", PROGRAM, FRONTEND_MARK, colour),
                title="toy",
                kind="toy",
                log=self.log,
                device="toy0",
                removal=(QmpCommand("chardev-remove", {"id": "toy-char"}),),
            ),
        )
