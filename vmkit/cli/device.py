"""The verbs `vmkit device ...`: a device of ours as a process for any VMM."""

import os
import sys
from pathlib import Path

import click

from vmkit.cli.values import VSOCK_PORT, Number
from vmkit.machine.programs import render_environment
from vmkit.machine.spec import FIRST_GUEST_CID, LAST_GUEST_CID


@click.group("device", context_settings={"help_option_names": ["-h", "--help"]})
def device() -> None:
    """Serve a device of vmkit to any VMM that speaks vhost-user."""


@device.command("vsock")
@click.option(
    "--socket",
    "frontend",
    type=click.Path(path_type=Path),
    required=True,
    metavar="SOCKET",
    help="Where the VMM connects, with vhost-user.",
)
@click.option(
    "--cid",
    type=Number("cid", FIRST_GUEST_CID, LAST_GUEST_CID),
    required=True,
    metavar="CID",
    help="The guest's address.",
)
@click.option(
    "--uds-path",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Where programs of this host connect; the guest reaches SOCKET_PORT [default: the VMM's, and `.host`].",
)
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Where `vmkit vsock --control SOCKET` connects.",
)
@click.option(
    "--privileged-port",
    "privileged",
    type=VSOCK_PORT,
    multiple=True,
    metavar="PORT",
    help="A host port for source ports below 1024 alone (repeatable).",
)
@click.option("--no-sandbox", is_flag=True, help="Run without limits on system calls and memory, to look for faults.")
def serve_vsock(
    *,
    frontend: Path,
    cid: int,
    uds_path: Path | None,
    control: Path | None,
    privileged: tuple[int, ...],
    no_sandbox: bool,
) -> None:
    """Serve a vsock device to one VMM, until it leaves.

    The process makes its sockets for you alone. The VMM's comes last: when it exists, all do.
    A program of this host connects to the second socket, writes `CONNECT PORT`, and reads `OK`.
    """
    argv = [sys.executable, "-P", "-m", "vmkit.vsock", "--guest-cid", str(cid), "--socket", os.fspath(frontend)]
    argv += ["--uds-path", os.fspath(uds_path if uds_path is not None else f"{frontend}.host")]
    argv += [] if control is None else ["--control", os.fspath(control)]
    for port in privileged:
        argv += ["--privileged-port", str(port)]
    argv += ["--no-sandbox"] if no_sandbox else []
    # Its own process from here on: the sandbox needs a small one.
    os.execve(sys.executable, argv, render_environment(os.environ))  # noqa: S606
