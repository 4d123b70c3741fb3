"""The name of this machine: the kernel's hostname, and the line of /etc/hosts by which programs find it."""

import _socket
import os

# sethostname(2) takes 64 bytes (HOST_NAME_MAX); names of vmkit have 32.
NAME_MAX = 64
LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
HOSTNAME_FILE = "/etc/hostname"
HOSTS_FILE = "/etc/hosts"
# Debian's address for the machine's own name.
OWN_ADDRESS = b"127.0.1.1"
FILE_BYTES_MAX = 64 << 10


def is_name(name: bytes) -> bool:
    """Whether a machine can be called so."""
    return 0 < len(name) <= NAME_MAX and LETTERS.issuperset(name) and not name.startswith((b"-", b"."))


def take_name(name: bytes, hostname_file: str = HOSTNAME_FILE, hosts_file: str = HOSTS_FILE) -> None:
    """Gives the kernel the name, and the files of the image that have one. Raises OSError where the kernel refuses.

    A root that cannot be written to keeps its files.
    """
    _socket.sethostname(os.fsdecode(name))
    for path in (hostname_file, hosts_file):
        try:
            with open(path, "r+b") as file:
                text = file.read(FILE_BYTES_MAX + 1)
                changed = name + b"\n" if path == hostname_file else add_host(text, name)
                if len(text) > FILE_BYTES_MAX or changed == text:
                    continue
                file.seek(0)
                file.write(changed)
                file.truncate()
        except OSError:
            continue


def add_host(hosts: bytes, name: bytes) -> bytes:
    """The text of /etc/hosts with `name` as this machine's own: in the line of OWN_ADDRESS, or in one at the end."""
    lines = hosts.splitlines(keepends=True)
    own = OWN_ADDRESS + b" " + name + b"\n"
    for index, line in enumerate(lines):
        words = line.partition(b"#")[0].split()
        if words[:1] == [OWN_ADDRESS]:
            lines[index] = own
            return b"".join(lines)
    if lines and not lines[-1].endswith(b"\n"):
        lines.append(b"\n")
    return b"".join(lines) + own


def find_name(command_line: str, argument: str = "vmkit.name=") -> bytes:
    """The name that the kernel's command line gives this machine; empty without one that can be."""
    words = [word for word in command_line.split() if word.startswith(argument)]
    name = os.fsencode(words[-1].removeprefix(argument)) if words else b""
    return name if is_name(name) else b""
