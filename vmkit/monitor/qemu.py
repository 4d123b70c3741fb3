"""Starts a machine's QEMU by its plan, and makes the sockets in the machine's directory."""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from vmkit.architectures import find_package
from vmkit.machine.argv import BY_HAND_NOTE
from vmkit.machine.launch import LaunchPlan, Layout
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.logs import CappedLog
from vmkit.run import render_command

BACKLOG = 64


@dataclass(frozen=True, slots=True)
class QemuDescriptors:
    """What QEMU inherits, beside the sockets of parts: its ends of the console and of QMP, and the guest's memory."""

    console: int
    qmp: int
    memory: int


async def start_qemu(
    plan: LaunchPlan, fittings: Fittings, descriptors: QemuDescriptors, ready_port: int, log: CappedLog
) -> Child:
    """Starts QEMU, and leaves its command in the machine's directory. Raises HostError."""
    with fittings.listen() as served:
        argv = plan.qemu.render_argv(
            console_fd=descriptors.console,
            qmp_fd=descriptors.qmp,
            memory_fd=descriptors.memory,
            ready_port=ready_port,
            served=served,
        )
        lines = [render_command(argv), ""]
        if plan.snapshot is None:
            lines[1:1] = [BY_HAND_NOTE, render_command(plan.qemu.render_by_hand())]
        with contextlib.suppress(OSError):
            text = "\n".join(lines)
            (plan.directory / Layout.ARGV).write_bytes(os.fsencode(text))
        fds = (descriptors.console, descriptors.qmp, descriptors.memory, *served.values())
        return await start_child("qemu", argv, log=log, pass_fds=fds, package=find_package(argv[0]))


def listen_within(path: Path, stack: contextlib.AsyncExitStack) -> socket.socket:
    """A listening socket of this user's alone, open as long as the stack is. One of the last boot's gives way."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(sock.close)
    path.unlink(missing_ok=True)
    sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock
