"""The track: a machine of the image bench, and every connection to it that the race needs, set up once."""

import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmkit.bench.guest import ParamikoGuest, VshGuest
from vmkit.bench.programs import Running, time_program
from vmkit.bench.sinks import PIPE, RELAY, SINK
from vmkit.errors import CommandError, HostError
from vmkit.machine.machine import Machine
from vmkit.ssh.access import START, Access, prepare_access
from vsh.address import Address, address_of
from vsh.forward.guest import connect_guest
from vsh.registry import find_machine

# A hundred sessions of sshd at once have three processes each.
IMAGE, MEMORY = "bench", "1G"
SINK_PORT, RELAY_PORT, PIPE_PORT = 5001, 5002, 5003
DEADLINE_S = 60.0
# Ciphers worth a try; the fastest of a run is named beside ssh's own choice.
CIPHERS = ("chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com", "aes128-ctr")
CIPHER_TRIAL_BYTES = 4 << 20
# From OpenSSH 9.5 on a client sends keys every 20 ms, to hide how they are typed; an older one knows no such option.
PROMPT = ("-o", "IgnoreUnknown=ObscureKeystrokeTiming", "-o", "ObscureKeystrokeTiming=no")


@dataclass(frozen=True, slots=True)
class Track:
    """A running machine and the words that start each side's programs."""

    machine: Machine
    address: Address
    access: Access
    folder: Path
    vsh: tuple[str, ...]
    ssh: tuple[str, ...]
    ssh_master: tuple[str, ...]
    fastest_cipher: str
    api: VshGuest
    paramiko: ParamikoGuest | None
    # What could not be measured of a heat that went on.
    failures: list[str] = field(default_factory=list)

    def connect(self, port: int) -> socket.socket:
        """Returns a connection to a vsock port of the guest."""
        fd, _ = connect_guest(self.address, f"vsock:{port}", timeout_s=DEADLINE_S)
        connection = socket.socket(fileno=fd)
        connection.settimeout(DEADLINE_S)
        return connection


@contextlib.contextmanager
def open_track(*, accelerator: str | None = None) -> Iterator[Track]:
    """Starts the machine and all connections that stay open. Raises VshError kinds."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmkit-bench-")))
        name = f"bench-{os.getpid()}"
        machine = stack.enter_context(Machine(IMAGE, name=name, memory=MEMORY, accelerator=accelerator))
        entry = find_machine(name=machine.name)
        if entry is None:
            raise HostError("the machine of the race is gone")
        access = prepare_access(entry, folder=folder / "ssh")
        address = address_of(entry)
        vsh = plan_vsh(machine.name)
        ssh = ("ssh", "-F", str(access.config), *PROMPT, "-o", "ControlMaster=no")
        master = _open_master(stack, access, folder)
        for script, words in ((SINK, [SINK_PORT]), (RELAY, [RELAY_PORT, SINK_PORT]), (PIPE, [PIPE_PORT])):
            start_script(stack, vsh, script, words)
        paramiko = None
        with contextlib.suppress(HostError):
            paramiko = ParamikoGuest(address, access)
            stack.callback(paramiko.close)
        yield Track(
            machine=machine,
            address=address,
            access=access,
            folder=folder,
            vsh=vsh,
            ssh=(*ssh, access.machine),
            ssh_master=master,
            fastest_cipher=_find_fastest_cipher((*ssh, access.machine), folder),
            api=VshGuest(address),
            paramiko=paramiko,
        )


def with_cipher(ssh: Sequence[str], cipher: str) -> tuple[str, ...]:
    """Returns ssh's words with another cipher."""
    return (ssh[0], "-o", f"Ciphers={cipher}", *ssh[1:])


def _open_master(stack: contextlib.ExitStack, access: Access, folder: Path) -> tuple[str, ...]:
    """Starts a ControlMaster, and returns the words that use it."""
    control = ["-o", f"ControlPath={folder / 'master'}"]
    ssh = ("ssh", *control, "-F", str(access.config), *PROMPT)
    stack.enter_context(Running([*ssh, "-o", "ControlMaster=yes", "-N", access.machine]))
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(CommandError):
            time_program([*ssh, "-O", "check", access.machine])
            return (*ssh, access.machine)
        if time.monotonic() > deadline_s:
            raise HostError("ssh's master connection does not come up")
        # ssh has no other sign that the connection is up.
        time.sleep(0.1)


def plan_vsh(machine: str) -> tuple[str, ...]:
    """Returns the words of this checkout's vsh client, which come before those of a session."""
    start = START.format(str(Path(__file__).resolve().parents[2]))
    return (sys.executable, "-I", "-S", "-c", start, f"--vm_name={machine}")


def start_script(stack: contextlib.ExitStack, vsh: Sequence[str], script: str, words: Sequence[int]) -> None:
    """Starts a script of vmkit.bench.sinks in a guest, for as long as the stack lasts; it listens. Raises HostError."""
    argv = [*vsh, "--", "python3", "-I", "-S", "-c", script, *map(str, words)]
    running = stack.enter_context(Running(argv))
    if running.stdout.readline() != b"up\n":
        raise HostError("a helper of the race did not start in the guest")


def _find_fastest_cipher(ssh: Sequence[str], folder: Path) -> str:
    """Finds the fastest cipher by a short trial of each that both sides have."""
    data = folder / "trial"
    with data.open("wb") as file:
        file.truncate(CIPHER_TRIAL_BYTES)
    taken: dict[str, float] = {}
    for cipher in CIPHERS:
        with contextlib.suppress(CommandError):
            taken[cipher] = time_program([*with_cipher(ssh, cipher), "cat >/dev/null"], stdin=data)
    if not taken:
        raise HostError("no cipher of ssh works", hint="vmkit ssh NAME true prints why")
    return min(taken, key=taken.__getitem__)
