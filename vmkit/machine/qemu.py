"""Turns a machine's hardware into QEMU's argv and the devices to plug over QMP. Pure: opens nothing, starts nothing.

The reason for each option stands beside it. The measurements behind them are in docs/explanation/decisions.md.
"""

import os
from itertools import chain

from vmkit.errors import ConfigError
from vmkit.machine.argv import (
    CONSOLE_CHARDEV,
    MEMORY_MARK,
    QMP_CHARDEV,
    QMP_MONITOR,
    READY_PORT_MARK,
    TOKEN_WORD,
    QemuPlan,
)
from vmkit.machine.hardware import Hardware
from vmkit.machine.parts.part import render_options
from vmkit.machine.parts.table import PARTS
from vmkit.machine.spec import Accelerator
from vmkit.machine.token import TOKEN_PATH

# `quiet` keeps the slow serial line out of the boot's time. panic=-1 turns every panic into a reset at once, and that
# ends the machine (reboot=shutdown). cryptomgr.notests saves the self tests of the kernel's ciphers, a quarter of a
# boot under TCG.
BASE_KERNEL_ARGS = ("quiet", "panic=-1", "cryptomgr.notests")
# The guest takes its machine's name for its hostname.
NAME_WORD = "vmkit.name="


def render_kernel_command_line(hardware: Hardware) -> str:
    """The guest's kernel command line: ours, the image's, the user's last, so that the user wins.

    Raises ConfigError where the kernel would silently cut it.
    """
    port = READY_PORT_MARK if hardware.ready_port is None else hardware.ready_port
    console, own = f"console={hardware.architecture.console}", hardware.architecture.kernel_args
    words = [*dict.fromkeys([console, *BASE_KERNEL_ARGS, *own, *hardware.kernel_args]), f"vmkit.ready={port}"]
    words.append(f"{NAME_WORD}{hardware.name}")
    if hardware.token is not None:
        words.append(f"{TOKEN_WORD}{'smbios' if hardware.architecture.has_oem_strings else f'file:/{TOKEN_PATH}'}")
    for part in PARTS:
        words += part.plan_words(hardware)
    line = " ".join([*words, hardware.spec.append]).strip()
    size_bytes = len(os.fsencode(line))
    limit_bytes = hardware.architecture.command_line_bytes
    if size_bytes > limit_bytes:
        raise ConfigError(
            f"the kernel command line is too long: {size_bytes} bytes of {limit_bytes}",
            hint="shorten --append or the image's kernel arguments",
        )
    return line


def plan_qemu(hardware: Hardware) -> QemuPlan:
    """QEMU's argv (paused, no display, no network and no disk but those asked for), and what each part needs beside."""
    return QemuPlan(
        argv=(
            hardware.qemu,
            "-name", f"guest={hardware.name},process=vmkit-{hardware.name}",
            # Nothing that was not asked for: no VGA, no NIC, no floppy, no configuration of the host's.
            "-nodefaults", "-no-user-config", "-display", "none",
            # Paused until the device is plugged; a reset of the guest ends the machine instead of looping.
            "-S", "-action", "reboot=shutdown",
            # A guest that breaks into QEMU finds no execve, no setuid and no resource control there.
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-machine", f"{hardware.architecture.board},memory-backend=ram",
            *_plan_cpu(hardware),
            "-smp", str(hardware.spec.cpus),
            "-m", f"{hardware.spec.memory_mib}M",
            # Shared: the vsock device of `user` maps it, and the monitor reads the kernel's log there.
            "-object", f"memory-backend-{MEMORY_MARK},id=ram,size={hardware.spec.memory_mib}M,share=on",
            *chain.from_iterable(part.plan_argv(hardware) for part in PARTS),
            "-chardev", CONSOLE_CHARDEV, "-serial", "chardev:console",
            "-chardev", QMP_CHARDEV, "-mon", QMP_MONITOR,
            # By it a kernel learns that it is a copy: new for each QEMU. Only guests that are saved become copies.
            *(() if hardware.architecture.is_emulated else ("-device", "vmgenid,guid=auto")),
            *_plan_kernel(hardware),
            *_plan_token(hardware),
        ),
        fittings=tuple(filter(None, (part.plan_fitting(hardware) for part in PARTS))),
    )  # fmt: skip


def _plan_cpu(hardware: Hardware) -> tuple[str, ...]:
    if hardware.accelerator is Accelerator.KVM:
        return ("-accel", "kvm", "-cpu", hardware.spec.cpu or "host")
    if hardware.architecture.is_emulated:
        accel = "tcg,thread=single" if hardware.nested else "tcg"
        return ("-accel", accel, "-cpu", hardware.spec.cpu or hardware.architecture.cpu)
    if hardware.nested:
        # Emulation inside emulation: a plain model is faster, and kernels panic on any that has cmpxchg16b.
        return ("-accel", "tcg,thread=single", "-cpu", hardware.spec.cpu or "qemu64,-cx16")
    return ("-accel", "tcg", "-cpu", hardware.spec.cpu or hardware.architecture.cpu)


def _plan_kernel(hardware: Hardware) -> tuple[str, ...]:
    """What QEMU loads before it starts the guest; a restored one has it in its memory."""
    if hardware.is_restored:
        return ("-incoming", "defer")
    line = render_kernel_command_line(hardware)
    return ("-kernel", str(hardware.kernel), "-initrd", str(hardware.initrd), "-append", line)


def _plan_token(hardware: Hardware) -> tuple[str, ...]:
    """An OEM string of the firmware's tables: root alone reads them in the guest, and every kernel shows them.

    A restored guest gets its token by the thaw: its firmware does not run again. Other architectures have it in the
    initramfs.
    """
    if hardware.token is None or hardware.is_restored or not hardware.architecture.has_oem_strings:
        return ()
    # In QEMU's options a comma ends a value, and two are one.
    return ("-smbios", render_options({"type": "11", "path": str(hardware.token)}))
