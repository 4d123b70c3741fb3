"""The verb `vmkit up`: its options. What it does is vmkit.cli.boot's, imported when the monitor is on its way."""

import contextlib
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from vmkit.cli.values import SECONDS, complete_images, parse_gdb_port
from vmkit.errors import ConfigError
from vmkit.machine.handover import start_monitor
from vmkit.machine.spec import (
    DEFAULT_CPUS,
    DEFAULT_MEMORY_MIB,
    DEFAULT_TIMEOUT_S,
    Accelerator,
    Backend,
    MachineSpec,
    make_disks,
    parse_memory,
)
from vsh.registry import find_machine


@click.command("up")
@click.argument("image", default="tiny", shell_complete=complete_images)
@click.option("--name", help="Name of the machine [default: the image's name].")
@click.option("--cid", type=int, help="vsock context id [default: the lowest free one from 3 on].")
@click.option("--memory", default=str(DEFAULT_MEMORY_MIB), show_default=True, help="MiB, or with a unit: 1G.")
@click.option("--cpus", type=int, default=DEFAULT_CPUS, show_default=True, help="Number of vCPUs.")
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True, help="Accelerator of QEMU."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "vhost", "user"]),
    default="auto",
    show_default=True,
    help="vsock device: the kernel's (vhost) or vmkit's own (user).",
)
@click.option("--kernel", type=click.Path(path_type=Path), help="Boot this kernel instead of the image's.")
@click.option("--append", default="", help="More kernel arguments.")
@click.option(
    "--root", type=click.Path(path_type=Path), help="Use this ext4 file as the root instead of the image's disk."
)
@click.option(
    "--disk", "disks", multiple=True, type=click.Path(path_type=Path), help="Attach a disk, read-only (repeatable)."
)
@click.option(
    "--rwdisk", "rwdisks", multiple=True, type=click.Path(path_type=Path), help="Attach a writable disk (repeatable)."
)
@click.option(
    "--gdb",
    is_flag=False,
    flag_value="",
    metavar="[=PORT]",
    help="Serve gdb's remote protocol on a socket of yours, or on 127.0.0.1:PORT for every user of this host.",
)
@click.option("--cpu", help="CPU model and features, as for QEMU's -cpu [default: every feature that works].")
@click.option(
    "--timeout",
    type=SECONDS,
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait until the guest is ready.",
)
@click.option("--token", is_flag=True, help="Clients must prove the machine's token [always on with vhost].")
@click.option("--console", is_flag=True, help="Show the guest's console while it boots.")
@click.option("--reuse", is_flag=True, help="Use the machine of that name if there is one; wait while it starts.")
@click.option("--dry-run", is_flag=True, help="Print what would be built and started, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def up(  # noqa: PLR0913
    *,
    image: str,
    name: str | None,
    cid: int | None,
    memory: str,
    cpus: int,
    accel: str,
    backend: str,
    kernel: Path | None,
    append: str,
    root: Path | None,
    disks: tuple[Path, ...],
    rwdisks: tuple[Path, ...],
    gdb: str | None,
    cpu: str | None,
    timeout: float,
    token: bool,
    console: bool,
    reuse: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Start a machine and wait until it is ready.

    IMAGE is a shipped image's name (see `vmkit images`; default: tiny) or the path of your own recipe.
    """
    gdb_port = parse_gdb_port(gdb)
    if gdb and gdb_port is None:
        # `--gdb debian`: the word behind the option is the image.
        if click.get_current_context().get_parameter_source("image") is not ParameterSource.DEFAULT:
            raise ConfigError(f"--gdb must be a port, not '{gdb}'", hint="--gdb alone serves a socket")
        image = gdb
    spec = MachineSpec(
        image=image,
        name=name,
        cid=cid,
        memory_mib=parse_memory(memory),
        cpus=cpus,
        accelerator=None if accel == "auto" else Accelerator(accel),
        backend=None if backend == "auto" else Backend(backend),
        kernel=kernel.absolute() if kernel else None,
        append=append,
        root=root.absolute() if root else None,
        disks=make_disks(disks, rwdisks),
        gdb=gdb is not None and gdb_port is None,
        gdb_port=gdb_port,
        cpu=cpu,
        timeout_s=timeout,
        token=token,
    )
    # The rest of vmkit is imported while the monitor's interpreter starts: each takes a tenth of a second.
    with contextlib.ExitStack() as stack:
        if reuse:
            spec = replace(spec, name=name or Path(image).stem)
        is_there = reuse and find_machine(name=spec.name) is not None
        monitor = None if dry_run or is_there else stack.enter_context(start_monitor())
        from vmkit.cli import boot  # noqa: PLC0415

        if dry_run:
            boot.print_plan(spec, as_json=as_json)
        elif reuse:
            boot.boot_or_reuse(spec, monitor, console=console, as_json=as_json, quiet=quiet)
        else:
            boot.boot(spec, monitor, console=console, as_json=as_json, quiet=quiet)
