"""A machine's own ssh access: a key pair made for it, and the guest's host key, both exchanged through vsh.

Nothing is trusted on first use: both keys travel over vsh, which knows that it speaks to the machine. The files live in
the machine's directory and go with it.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vmkit.errors import HostError, MachineError
from vmkit.run import run
from vsh.address import address_of
from vsh.client import Client
from vsh.registry import Entry
from vsh.text import clean_text
from vshd.carry.inherited import OF_PYTHON

FOLDER = "ssh"
KEY, KNOWN_HOSTS, CONFIG = "key", "known_hosts", "config"
DEFAULT_PORT = 22
KEYGEN_TIMEOUT_S = 30.0
GUEST_TIMEOUT_S = 60.0
# Runs in the guest, with our public key as stdin; answers with its host keys.
# vsh without pip's script, whose imports would be half of its time.
START = "import sys; sys.path.insert(0, {!r}); from vsh.__main__ import main; sys.exit(main())"
INSTALL = """
mkdir -p -m 700 "$HOME/.ssh" && cat >> "$HOME/.ssh/authorized_keys" && chmod 600 "$HOME/.ssh/authorized_keys" &&
cat /etc/ssh/ssh_host_*_key.pub
"""


@dataclass(frozen=True, slots=True)
class Access:
    """Where a machine's files for ssh are; user: whose authorized_keys has the key."""

    machine: str
    user: str
    folder: Path

    @property
    def key(self) -> Path:
        return self.folder / KEY

    @property
    def known_hosts(self) -> Path:
        return self.folder / KNOWN_HOSTS

    @property
    def config(self) -> Path:
        return self.folder / CONFIG


def prepare_access(entry: Entry, *, user: str = "root", port: int = DEFAULT_PORT) -> Access:
    """Makes sure that `user` of the machine can be logged in to with its key. Raises VshError kinds.

    Quick when that has been done for this very machine and user.
    """
    folder = Path(entry.directory) / FOLDER
    access = Access(entry.name, user, folder)
    done = folder / f"done.{user}"
    if not done.exists():
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot write to {folder}: {error.strerror}") from error
        if not access.key.exists():
            argv: list[str | Path] = [
                "ssh-keygen",
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-C",
                f"vmkit {entry.name}",
                "-f",
                access.key,
            ]
            run(argv, timeout_s=KEYGEN_TIMEOUT_S, package="openssh-client")
        _exchange_keys(entry, access)
        done.touch()
    access.config.write_text(render_config(access, port=port, runtime=os.environ.get("VMKIT_RUNTIME_DIR")))
    return access


def render_config(access: Access, *, port: int = DEFAULT_PORT, runtime: str | None = None) -> str:
    """The machine's block for ssh_config(5). runtime: the runtime directory where it is not the usual one.

    The connection itself is handed to ssh (ProxyUseFdpass): nobody copies bytes between it and the guest.
    """
    start = START.format(str(Path(__file__).resolve().parents[2]))
    vsh = [sys.executable, "-I", "-S", "-c", start]
    proxy = [*vsh, f"--vm_name={access.machine}", f"--proxy=vsock:{port}", "--fdpass"]
    if runtime:
        proxy = ["env", f"VMKIT_RUNTIME_DIR={os.path.abspath(runtime)}", *proxy]  # noqa: PTH100  (a string goes on)
    lines = [
        f"Host {access.machine}",
        f"    HostName {access.machine}",
        f"    User {access.user}",
        f"    ProxyCommand {shlex.join(proxy).replace('%', '%%')}",
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


def _exchange_keys(entry: Entry, access: Access) -> None:
    public = access.key.with_suffix(".pub").read_bytes()
    client = Client(address_of(entry))
    done = client.run(["sh", "-c", INSTALL], input=public, user=access.user, timeout=GUEST_TIMEOUT_S)
    if done.exit != 0:
        raise MachineError(
            f"machine '{entry.name}' has no sshd, or none with host keys",
            details=clean_text(done.stderr),
            hint="the image bench has one: vmkit up bench",
        )
    keys = [line.split()[:2] for line in done.stdout.decode(errors="replace").splitlines() if len(line.split()) > 1]
    access.known_hosts.write_text("".join(f"{access.machine} {kind} {key}\n" for kind, key in keys))


def become_ssh(access: Access, words: Sequence[str]) -> NoReturn:
    """This process goes on as ssh. Raises HostError."""
    for number in OF_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp("ssh", ["ssh", "-F", str(access.config), access.machine, *words])  # noqa: S606, S607
    except OSError as error:
        hint = "install it: sudo apt-get install openssh-client"
        raise HostError(f"cannot run ssh: {error.strerror}", hint=hint) from error
