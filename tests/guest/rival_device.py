"""Debian's vhost-device-vsock, the device of rust-vmm: fetched from the archive, its signature checked."""

from pathlib import Path

from vmkit.image.debian.apt import Apt, Archive
from vmkit.image.debian.deb import read_deb
from vmkit.image.debian.origin import choose_mirror, find_keyring

PACKAGE = "vhost-device-vsock"
# The first release of Debian that has it.
SUITE = "forky"


def fetch_program(folder: Path) -> Path:
    """The program in a folder, with its licence's text beside it. Raises BuildError."""
    program = folder / PACKAGE
    if not program.exists():
        state = folder / "apt"
        state.mkdir(parents=True, exist_ok=True)
        apt = Apt(state, Archive(choose_mirror(""), SUITE, ("main",), find_keyring()))
        apt.update()
        record = apt.show([PACKAGE])[PACKAGE]
        apt.download([record], folder)
        (package,) = folder.glob("*.deb")
        nodes = dict(read_deb(package))
        program.write_bytes(nodes[f"usr/bin/{PACKAGE}"].data)
        program.chmod(0o755)
    return program
