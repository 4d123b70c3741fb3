"""For which processor a root's programs are made, by the first of them that is there (elf.h, e_machine).

Pure. A root for another machine boots into "Exec format error"; this says so before.
"""

import struct

from vmkit.architectures import ARCHITECTURES
from vmkit.errors import ConfigError
from vmkit.image.formats.tree import FileKind, Tree

_MACHINES = {
    0x03: "i386",
    0x3E: "amd64",
    0xB7: "arm64",
    0x28: "armhf",
    0xF3: "riscv64",
    0x16: "s390x",
    0x15: "ppc64el",
}
# A kernel of amd64 runs programs of i386, too.
_RUNS = {"amd64": ("amd64", "i386"), "arm64": ("arm64", "armhf")}
_ASKED = ("bin/sh", "sbin/init", "usr/bin/env", "bin/busybox", "usr/bin/bash", "usr/lib/systemd/systemd")
_HEAD_BYTES = 20


def find_machine(head: bytes) -> str:
    """The processor of a program by its first bytes; empty where it is no ELF file, or for one that is unknown."""
    if len(head) < _HEAD_BYTES or head[:4] != b"\x7fELF":
        return ""
    number = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]
    return _MACHINES.get(number, "")


def check_architecture(tree: Tree, architecture: str, name: str) -> None:
    """Raises ConfigError when the root's programs are for another processor than the machine's."""
    for path in _ASKED:
        node = tree.resolve(path)
        if node is None or node.kind is not FileKind.FILE:
            continue
        machine = find_machine(next(iter(node.chunks()), b""))
        if machine:
            if machine not in _RUNS.get(architecture, (architecture,)):
                raise ConfigError(
                    f"{name} is made for {machine}, and the machine is {architecture}: see /{path}",
                    hint="choose a root for this architecture"
                    + (f", or a machine for the root: --arch {machine}" if machine in ARCHITECTURES else ""),
                )
            return
