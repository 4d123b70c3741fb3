"""ssh access to a machine with the keys of its name (vmkit.ssh.keys), which it exchanges with the guest through vsh.

It trusts no key on first use: keys travel over vsh, which is connected to the right machine. The keys outlive the
machine, so a block of ssh_config stays valid for the next machine of the name. A mark in the machine's directory
(vmkit.ssh.mark) records that its guest has them.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.ssh.keys import HOST_KEY, find_folder, hold_folder, make_keys, write_file
from vmkit.ssh.mark import KEY, KNOWN_HOSTS, MARKS, PUBLIC_KEY, describe_keys, find_mark, is_current
from vsh.address import address_of
from vsh.client import Client
from vsh.registry import Entry
from vsh.text import clean_text
from vshd.carry.inherited import OF_PYTHON

DEFAULT_PORT = 22
GUEST_TIMEOUT_S = 60.0
# Host keys are a few hundred bytes each.
MAX_OUTPUT_BYTES = 64 << 10
# As useradd has it, and what a file's name can hold.
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# vsh and the ProxyCommand without pip's script, whose imports would be half of their time.
START = "import sys; sys.path.insert(0, {!r}); from vsh.__main__ import main; sys.exit(main())"
PROXY = "import sys; sys.path.insert(0, {!r}); from vmkit.ssh.__main__ import main; sys.exit(main())"
# Runs in the guest as the user, with our public key as stdin.
INSTALL = """
mkdir -p -m 700 "$HOME/.ssh" && touch "$HOME/.ssh/authorized_keys" && chmod 600 "$HOME/.ssh/authorized_keys" &&
read -r key && { grep -qxF "$key" "$HOME/.ssh/authorized_keys" || echo "$key" >> "$HOME/.ssh/authorized_keys"; }
"""
# An image whose hook makes a host key at every boot names it in this file: then the key of the machine's name takes its
# place. Host keys of an image's own are left as they are.
ADOPT = """
[ -s /run/vmkit/ssh-host-key ] || exit 3
read -r path < /run/vmkit/ssh-host-key && umask 077 && cat > "$path.new" && mv "$path.new" "$path" &&
ssh-keygen -y -f "$path" > "$path.pub" && chmod 644 "$path.pub"
"""
NOTHING_TO_ADOPT = 3
READ_HOST_KEYS = "cat /etc/ssh/ssh_host_*_key.pub"


@dataclass(frozen=True, slots=True)
class Access:
    """The paths of the files for ssh. user: its authorized_keys has the key; directory: the machine's."""

    machine: str
    user: str
    folder: Path
    directory: Path
    port: int = DEFAULT_PORT

    @property
    def key(self) -> Path:
        return self.folder / KEY

    @property
    def known_hosts(self) -> Path:
        return self.folder / KNOWN_HOSTS

    @property
    def mark(self) -> Path:
        return Path(find_mark(str(self.directory), self.user))

    @property
    def config(self) -> Path:
        return self.directory / MARKS / f"config.{self.user}.{self.port}"


def plan_access(entry: Entry, *, user: str = "root", port: int = DEFAULT_PORT, folder: Path | None = None) -> Access:
    """Returns the paths of that machine's and user's files. folder: for the keys, instead of the name's own."""
    if not _USER.fullmatch(user):
        raise ConfigError(f"'{clean_text(user)}' cannot be the name of a user")
    return Access(entry.name, user, folder or find_folder(entry.name), Path(entry.directory), port)


def prepare_access(entry: Entry, *, user: str = "root", port: int = DEFAULT_PORT, folder: Path | None = None) -> Access:
    """Makes sure that the key of the machine's name can log in as `user`, and writes the block for ssh.

    Quick when that has been done for this very machine and user. Raises VshError kinds.
    """
    access = plan_access(entry, user=user, port=port, folder=folder)
    exchange_keys(entry, access)
    write_file(access.config, render_config(access, runtime=os.environ.get("VMKIT_RUNTIME_DIR")))
    return access


def exchange_keys(entry: Entry, access: Access) -> None:
    """Gives the guest the keys, unless its mark records that it has them, and fetches its host keys."""
    if is_current(str(access.mark), str(access.folder)):
        return
    with hold_folder(access.folder):
        # Another ssh may have done it meanwhile.
        if is_current(str(access.mark), str(access.folder)):
            return
        make_keys(access.folder, entry.name)
        _exchange(entry, access)
        try:
            access.mark.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot write to {access.mark.parent}: {error.strerror}") from error
        write_file(access.mark, describe_keys(str(access.folder)))


def render_config(access: Access, *, runtime: str | None = None) -> str:
    """Returns the block for ssh_config(5) for machines of that name. runtime: a runtime directory other than usual.

    ssh gets the connection itself (ProxyUseFdpass): no program copies bytes between it and the guest.
    """
    start = PROXY.format(str(Path(__file__).resolve().parents[2]))
    proxy = [sys.executable, "-I", "-S", "-c", start, access.machine, str(access.port), str(access.folder)]
    if runtime:
        proxy = ["env", f"VMKIT_RUNTIME_DIR={os.path.abspath(runtime)}", *proxy]  # noqa: PTH100  (a string goes on)
    lines = [
        f"Host {access.machine}",
        f"    HostName {access.machine}",
        f"    User {access.user}",
        # The user that ssh logs in as, even if it is not the one of the block.
        f"    ProxyCommand {shlex.join(proxy).replace('%', '%%')} %r",
        "    ProxyUseFdpass yes",
        f'    IdentityFile "{access.key}"',
        "    IdentitiesOnly yes",
        f'    UserKnownHostsFile "{access.known_hosts}"',
        "    GlobalKnownHostsFile /dev/null",
        "    StrictHostKeyChecking yes",
        "    UpdateHostKeys no",
        "    PreferredAuthentications publickey",
        "    ControlPath none",
    ]
    return "\n".join(lines) + "\n"


def become_ssh(access: Access, words: Sequence[str]) -> NoReturn:
    """Replaces this process by ssh. Raises HostError."""
    for number in OF_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp("ssh", ["ssh", "-F", str(access.config), access.machine, *words])  # noqa: S606, S607
    except OSError as error:
        hint = "install it: sudo apt-get install openssh-client"
        raise HostError(f"cannot run ssh: {error.strerror}", hint=hint) from error


def _exchange(entry: Entry, access: Access) -> None:
    """Gives the guest the name's host key, if its image takes one, and the user's key; fetches its host keys."""
    client = Client(address_of(entry))
    private, public = ((access.folder / name).read_bytes() for name in (HOST_KEY, PUBLIC_KEY))
    done = client.run(
        ["sh", "-c", ADOPT], input=private, user="root", timeout=GUEST_TIMEOUT_S, output_limit_bytes=MAX_OUTPUT_BYTES
    )
    if done.exit not in (0, NOTHING_TO_ADOPT):
        raise MachineError(f"machine '{entry.name}' did not take its host key", details=clean_text(done.stderr))
    script = ["sh", "-c", f"{INSTALL.strip()} && {READ_HOST_KEYS}"]
    done = client.run(
        script, input=public, user=access.user, timeout=GUEST_TIMEOUT_S, output_limit_bytes=MAX_OUTPUT_BYTES
    )
    if done.exit != 0:
        raise MachineError(
            f"machine '{entry.name}' has no sshd, or none with host keys",
            details=clean_text(done.stderr),
            hint="the image bench has one: vmkit up bench",
        )
    keys = [line.split()[:2] for line in clean_text(done.stdout).splitlines() if len(line.split()) > 1]
    write_file(access.known_hosts, "".join(f"{access.machine} {kind} {key}\n" for kind, key in keys))
