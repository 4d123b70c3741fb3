"""gdb's remote protocol, served by QEMU: on a socket in the machine's directory, or on a port of the loopback."""

import os
import socket
from typing import TYPE_CHECKING

from vmkit.errors import ConfigError, HostError
from vmkit.machine.launch import Layout
from vmkit.machine.parts.part import Fitting, Option, OptionKind, Part, ServedSocket
from vmkit.machine.spec import MAX_PORT

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

LOOPBACK = "127.0.0.1"
SOCKET = ServedSocket("gdb", Layout.GDB_SOCKET)


class GdbPart(Part):
    """`gdb`: the socket, which is the user's alone. `gdb_port`: the port, which every user of the host can reach."""

    name = "gdb"
    options = (
        Option(
            "gdb",
            OptionKind.VALUED_SWITCH,
            False,
            flag="--gdb",
            metavar="[=PORT]",
            help="Serve gdb on a UNIX socket that only you can open, or on 127.0.0.1:PORT, open to all users.",
            is_python=True,
        ),
        # The value of the command line's --gdb.
        Option("gdb_port", OptionKind.INTEGER, is_python=True),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.gdb and spec.gdb_port is not None:
            raise ConfigError("QEMU serves gdb on a socket or on a port, not on both")
        if spec.gdb_port is not None and not 1 <= spec.gdb_port <= MAX_PORT:
            raise ConfigError(f"--gdb must be a port between 1 and {MAX_PORT}, not {spec.gdb_port}")

    def check_host(self, spec: "MachineSpec") -> None:
        if spec.gdb_port is not None:
            check_gdb_port(spec.gdb_port)

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"gdb_port": spec.gdb_port}

    def plan_addresses(self, hardware: "Hardware") -> dict[str, object]:
        """What gdb's `target remote` takes."""
        if hardware.spec.gdb:
            return {"gdb": str(hardware.directory / Layout.GDB_SOCKET)}
        return {"gdb": None if hardware.spec.gdb_port is None else f"{LOOPBACK}:{hardware.spec.gdb_port}"}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        if hardware.spec.gdb:
            return ("-chardev", SOCKET.mark, "-gdb", "chardev:gdb")
        # Loopback alone: a program that reaches it owns the guest.
        return () if hardware.spec.gdb_port is None else ("-gdb", f"tcp:{LOOPBACK}:{hardware.spec.gdb_port}")

    def plan_fitting(self, hardware: "Hardware") -> Fitting | None:
        return Fitting(self.name, sockets=(SOCKET,)) if hardware.spec.gdb else None


def check_gdb_port(port: int) -> None:
    """Raises HostError when a program listens there. QEMU reports one that comes between this look and its start."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            raise HostError(
                f"QEMU cannot serve gdb on port {port}: {os.strerror(error.errno or 0)}",
                hint="choose another, or take a socket: --gdb alone",
            ) from error
