"""A machine of the image `nested`: a Linux host of the tests' own, with a real /dev/vhost-vsock and a real AF_VSOCK.

Whoever needs such a host takes the fixture `nested_host` (one for the whole run), runs commands in it and copies files
in and out. Machines started in it are inner machines. They run under its KVM, on the virtualisation that QEMU emulates,
and boot in 10 to 30 s; emulated in emulation (`--accel tcg`) it is minutes.

It also has a vsock of its own within itself, for as long as `loopback` lasts. Whoever changes something in it puts that
back: the next test finds the host VM as it was.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vmkit.image.recipe.config import load_image
from vmkit.image.wall.spec import LOOPBACK_MODULE
from vmkit.machine.machine import Machine
from vsh.client import Result

NAME = "nested"
# Not one that an inner machine would be given: the host VM has this one itself.
CID = 1000
# Its disk is in it, and the images of inner machines are on that.
MEMORY = "3G"
# The inner boot's own deadline: enough for emulation in emulation.
INNER_TIMEOUT_S = 480
COPY_TIMEOUT_S = 120.0
# A closed vsock socket waits up to 8 s for its peer's answer (linux/net/vmw_vsock/virtio_transport_common.c,
# VSOCK_CLOSE_TIMEOUT), and holds its transport until then.
CLOSE_TIMEOUT_S = 30
RUNTIME = "/tmp/vmkit-0"
STATE = "/root/.local/state/vmkit"


# Nothing loads the module but root's insmod: the wall's transport layer is up, and so are the others.
RECIPE = """\
extends = "nested"
description = "for tests: a host whose processes may connect to its own CID"
modules_available = ["{module}"]

[wall]
connect_cids = {cids}
"""


def write_recipe(folder: Path) -> Path:
    """The image `nested`, with vsock_loopback on its disk, and its kernel layer open for connections to its own CID."""
    path = folder / f"{NAME}.toml"
    cids = [*load_image("nested").wall.connect_cids, CID]
    path.write_text(RECIPE.format(module=LOOPBACK_MODULE, cids=cids))
    return path


class NestedHost:
    """The running host VM. `machine` is its own vmkit.Machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def run(
        self,
        *argv: str,
        timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        input: bytes = b"",
    ) -> Result[bytes]:
        """Runs a command in it as root, and returns what it wrote and how it ended."""
        return self.machine.run(argv, env=env, cwd=cwd, input=input, timeout=timeout_s)

    def check(self, *argv: str, timeout_s: float = 120.0) -> str:
        """Its standard output; an error of the test's when it ends with another status than 0."""
        result = self.run(*argv, timeout_s=timeout_s)
        assert result.exit == 0, f"{argv}: {result.exit}\n{result.stdout.decode()}\n{result.stderr.decode()}"
        return result.stdout.decode()

    def put(self, source: Path, target: str) -> None:
        """Copies a file, or a folder with what is in it, to the absolute path target; folders above it are made."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(source, arcname=target.lstrip("/"), filter=_without_caches)
        result = self.run("tar", "-x", "--no-same-owner", "-C", "/", input=packed.getvalue(), timeout_s=COPY_TIMEOUT_S)
        assert result.exit == 0, result.stderr.decode()

    def get(self, source: str, target: Path, *exclude: str) -> None:
        """Copies a file or a folder to below the folder target, without sockets and what has a name in `exclude`."""
        folder, name = os.path.split(source.rstrip("/"))
        patterns = [f"--exclude={pattern}" for pattern in ("*.sock*", *exclude)]
        words = ["tar", "-c", "--warning=no-file-changed", *patterns, "-C", folder, name]
        packed = self.run(*words, timeout_s=COPY_TIMEOUT_S).stdout
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(target, filter="data")

    @contextmanager
    def loopback(self) -> Iterator[None]:
        """Its processes reach its own CID, as peers of CID 1. At the end nothing of that is left, or it is an error."""
        self.check("sh", "-c", f"insmod $(find /lib/modules/ -name {LOOPBACK_MODULE}.ko)")
        try:
            yield
        finally:
            unload = f"for i in $(seq {CLOSE_TIMEOUT_S}); do rmmod {LOOPBACK_MODULE} && exit; sleep 1; done; exit 1"
            self.check("sh", "-c", unload)

    def save_evidence(self, target: Path) -> None:
        """The logs of its machines, those that run and those that ended badly, and its kernel's. No token of any."""
        for folder in (f"{RUNTIME}/machines", STATE):
            if self.run("test", "-d", folder).exit == 0:
                self.get(folder, target, "token")
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{NAME}.dmesg").write_bytes(self.run("dmesg").stdout)

    def end_machines(self) -> None:
        """Kills every machine in it."""
        self.run("vmkit", "kill", "--all", timeout_s=60)


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member
