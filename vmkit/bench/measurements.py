"""The heats: what each measures, on which sides, how often."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmkit.bench.alternation import Transfer, race, race_transfers
from vmkit.bench.guest import time_command
from vmkit.bench.network import find_network, open_network
from vmkit.bench.programs import Running, time_many, time_pipeline, time_program
from vmkit.bench.series import MIB, Aim, Series
from vmkit.bench.sinks import PlainRelay, plan_source, time_pipe, time_sending
from vmkit.bench.terminal import ECHOING, await_echoing, time_echoes
from vmkit.bench.testbed import PIPE_PORT, RELAY_PORT, SINK_PORT, Track, with_cipher
from vmkit.errors import HostError
from vmkit.machine.machine import Machine
from vsh.errors import VshError
from vsh.executor import Executor
from vsh.forward.spec import LOCAL, parse_forward

EXEC, BULK_OUT, BULK_IN, FILES, ECHO = "exec", "bulk out", "bulk in", "many files", "echo"
FORWARD_VSOCK, FORWARD_TCP, BOOT, MEMORY = "forward to vsock", "forward to TCP", "boot to ready", "memory"
VSH, SSH, MASTER, API, PARAMIKO = "vsh", "ssh", "ssh, ControlMaster", "vsh, Python API", "paramiko, open connection"
FASTEST, PLAIN, RAW = "ssh, fastest cipher", "plain Python relay", "raw vsock"
SOCAT, SSH_FORWARD, NETWORK = "socat pair", "ssh -L", "virtual network"

AIMS = (
    Aim(EXEC, VSH, SSH, 0.2, is_ceiling=True),
    Aim(EXEC, VSH, MASTER, 4.0, is_ceiling=True),
    Aim(EXEC, API, PARAMIKO, 3.0, is_ceiling=True),
    Aim(BULK_OUT, VSH, SSH, 3.0, is_ceiling=False),
    Aim(BULK_OUT, API, PLAIN, 0.8, is_ceiling=False),
    Aim(BULK_IN, VSH, SSH, 3.0, is_ceiling=False),
    Aim(BULK_IN, API, PLAIN, 0.8, is_ceiling=False),
    Aim(FORWARD_VSOCK, VSH, RAW, 0.8, is_ceiling=False),
    Aim(FORWARD_TCP, VSH, PLAIN, 0.8, is_ceiling=False),
    Aim(FORWARD_TCP, VSH, SOCAT, 1.5, is_ceiling=False),
    Aim("100 at once", VSH, SSH, 0.3, is_ceiling=True),
)
MANY = 100
FILE_COUNT, FILE_BYTES = 300, 2000
CONNECT_DEADLINE_S = 20.0


Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pace:
    """How much of everything: rounds of short and long heats, bytes of a transfer, how many at once and how often.

    A transfer is so long that the start of its session is about a tenth of it, or less. Under emulation vsh's start
    takes as long as carrying 4 MB. ssh's start takes as long as 12 MB (2.3 s at 5.4 MB/s, on a busy machine), or 16 MB
    with its fastest cipher (1.7 s at 9.6 MB/s). So ssh's transfers have ssh_bulk_bytes, and the others bulk_bytes.
    Forwards do not log in anew, and have forward_bytes.
    """

    rounds: int
    long_rounds: int
    bulk_bytes: int
    ssh_bulk_bytes: int
    forward_bytes: int
    at_once: tuple[tuple[int, int], ...]
    boots: int


FULL = Pace(
    rounds=15,
    long_rounds=5,
    bulk_bytes=128 << 20,
    ssh_bulk_bytes=128 << 20,
    forward_bytes=256 << 20,
    at_once=((1, 5), (10, 3), (100, 2)),
    boots=5,
)
QUICK = Pace(
    rounds=5,
    long_rounds=3,
    bulk_bytes=64 << 20,
    ssh_bulk_bytes=96 << 20,
    forward_bytes=96 << 20,
    at_once=((1, 3), (10, 2), (100, 1)),
    boots=2,
)


def run_heats(track: Track, pace: Pace, tell: Tell) -> tuple[list[Series], list[str]]:
    """Runs every heat. One that fails becomes a line among the failures, and the others go on."""
    heats: tuple[tuple[str, Callable[[Track, Pace], list[Series]]], ...] = (
        (EXEC, _race_exec),
        (BULK_OUT, _race_bulk_out),
        (BULK_IN, _race_bulk_in),
        (FILES, _race_files),
        (ECHO, _race_echo),
        ("at once", _race_at_once),
        (FORWARD_VSOCK, _race_forwards),
        (MEMORY, _weigh),
        (BOOT, _race_boot),
    )
    series: list[Series] = []
    failures: list[str] = []
    for name, heat in heats:
        tell(name)
        try:
            series += heat(track, pace)
        except (VshError, OSError) as error:
            failures.append(f"{name}: {error.brief if isinstance(error, VshError) else error}")
    return series, failures + track.failures


def _race_exec(track: Track, pace: Pace) -> list[Series]:
    sides: dict[str, Callable[[], float]] = {
        VSH: lambda: time_program([*track.vsh, "--", "true"]),
        SSH: lambda: time_program([*track.ssh, "true"]),
        MASTER: lambda: time_program([*track.ssh_master, "true"]),
        API: lambda: time_command(track.api, ["true"]),
    }
    paramiko = track.paramiko
    if paramiko is not None:
        guest: Executor = paramiko
        sides[PARAMIKO] = lambda: time_command(guest, ["true"])
    return race(EXEC, sides, pace.rounds)


def _race_bulk_out(track: Track, pace: Pace) -> list[Series]:
    fastest = with_cipher(track.ssh, track.fastest_cipher)
    sides = {
        VSH: Transfer(lambda size: time_program([*track.vsh, "--", *plan_source(size)]), pace.bulk_bytes),
        SSH: Transfer(lambda size: time_program([*track.ssh, *plan_source(size)]), pace.ssh_bulk_bytes),
        FASTEST: Transfer(lambda size: time_program([*fastest, *plan_source(size)]), pace.ssh_bulk_bytes),
        API: Transfer(lambda size: track.api.time_bulk("out", size), pace.bulk_bytes),
        PLAIN: Transfer(lambda size: time_pipe(track.connect(PIPE_PORT), "out", size), pace.bulk_bytes),
    }
    return race_transfers(BULK_OUT, sides, pace.long_rounds)


def _race_bulk_in(track: Track, pace: Pace) -> list[Series]:
    fastest = with_cipher(track.ssh, track.fastest_cipher)
    sink = "cat >/dev/null"

    def feed(*argv: str) -> Callable[[int], float]:
        return lambda size: time_program(argv, stdin=_make_data(track.folder, size))

    sides = {
        VSH: Transfer(feed(*track.vsh, "--", "sh", "-c", sink), pace.bulk_bytes),
        SSH: Transfer(feed(*track.ssh, sink), pace.ssh_bulk_bytes),
        FASTEST: Transfer(feed(*fastest, sink), pace.ssh_bulk_bytes),
        API: Transfer(lambda size: track.api.time_bulk("in", size), pace.bulk_bytes),
        PLAIN: Transfer(lambda size: time_pipe(track.connect(PIPE_PORT), "in", size), pace.bulk_bytes),
    }
    return race_transfers(BULK_IN, sides, pace.long_rounds)


def _make_data(folder: Path, size: int) -> Path:
    """Makes a file of `size` zeros, which takes no room."""
    path = folder / f"zeros-{size}"
    with path.open("ab") as file:
        file.truncate(size)
    return path


def _race_files(track: Track, pace: Pace) -> list[Series]:
    """Measures the copy of a folder of small files into the guest, each time to a new path there."""
    folder = track.folder / "files"
    folder.mkdir(exist_ok=True)
    for number in range(FILE_COUNT):
        (folder / f"{number}").write_bytes(os.urandom(FILE_BYTES))
    batch = track.folder / "batch"
    batch.write_text(f"put -r {folder} /tmp/sftp\n")
    config = ["-F", str(track.access.config)]
    name = track.access.machine
    tar = ["tar", "-C", str(folder), "-cf", "-", "."]
    unpack = "rm -rf /tmp/{0} && mkdir /tmp/{0} && tar -C /tmp/{0} -xf -"

    def by_scp() -> float:
        track.api.run(["rm", "-rf", "/tmp/scp"])  # noqa: S108 - the guest's
        return time_program(["scp", "-q", "-r", *config, str(folder), f"{name}:/tmp/scp"])

    def by_sftp() -> float:
        track.api.run(["sh", "-c", "rm -rf /tmp/sftp && mkdir /tmp/sftp"])
        return time_program(["sftp", "-q", "-b", str(batch), *config, name])

    sides = {
        "tar through vsh": lambda: time_pipeline(tar, [*track.vsh, "--", "sh", "-c", unpack.format("vsh")]),
        "tar through ssh": lambda: time_pipeline(tar, [*track.ssh, unpack.format("ssh")]),
        "scp": by_scp,
        "sftp": by_sftp,
    }
    return race(FILES, sides, pace.long_rounds)


def _race_echo(track: Track, pace: Pace) -> list[Series]:
    """Measures a keystroke to the guest's terminal and its echo back, in sessions that are open."""
    sessions = {
        VSH: [*track.vsh, "-t", "--", "sh", "-c", ECHOING],
        SSH: [track.ssh[0], "-tt", *track.ssh[1:], ECHOING],
        MASTER: [track.ssh_master[0], "-tt", *track.ssh_master[1:], ECHOING],
    }
    with contextlib.ExitStack() as stack:
        running = {side: stack.enter_context(Running(argv)) for side, argv in sessions.items()}
        sides: dict[str, Callable[[], float]] = {}
        for side, program in running.items():
            try:
                await_echoing(program)
            except (HostError, OSError) as error:
                # One that has no terminal is no reason not to ask the others.
                track.failures.append(f"{ECHO}: {side}: {error}")
            else:
                sides[side] = partial(time_echoes, program)
        return race(ECHO, sides, pace.long_rounds)


def _race_at_once(track: Track, pace: Pace) -> list[Series]:
    series = []
    for count, rounds in pace.at_once:
        sides = {
            VSH: lambda count=count: time_many([*track.vsh, "--", "true"], count),
            SSH: lambda count=count: time_many([*track.ssh, "true"], count),
        }
        # What the smaller numbers have warmed up need not be warmed by a minute of the largest.
        series += race(f"{count} at once", sides, rounds, has_warm_up=count < MANY)
    return series


def _race_forwards(track: Track, pace: Pace) -> list[Series]:
    size = pace.forward_bytes
    with contextlib.ExitStack() as stack:
        to_vsock = _open_port(stack, track, f"{SINK_PORT}")
        to_tcp = _open_port(stack, track, f"localhost:{SINK_PORT}")
        plain = PlainRelay(lambda: track.connect(RELAY_PORT))
        stack.callback(plain.close)
        by_ssh = _open_ssh_port(stack, track)
        direct = {
            VSH: Transfer(lambda size: time_sending(_connect(to_vsock), size), size),
            RAW: Transfer(lambda size: time_sending(track.connect(SINK_PORT), size), size),
        }
        relayed = {
            VSH: Transfer(lambda size: time_sending(_connect(to_tcp), size), size),
            PLAIN: Transfer(lambda size: time_sending(_connect(plain.port), size), size),
            SSH_FORWARD: Transfer(lambda size: time_sending(_connect(by_ssh), size), min(size, pace.ssh_bulk_bytes)),
        }
        if shutil.which("socat"):
            relayed[SOCAT] = Transfer(lambda size: _time_socat(track, size), size)
        network = _open_network(stack, track, size)
        direct |= network
        relayed |= network
        series = race_transfers(FORWARD_VSOCK, direct, pace.long_rounds)
        return series + race_transfers(FORWARD_TCP, relayed, pace.long_rounds)


def _open_network(stack: contextlib.ExitStack, track: Track, size: int) -> dict[str, Transfer]:
    """Opens the ceiling: TCP to such a sink with no relay in between. Empty when this host has no such network."""
    accelerator = track.machine.started.choices.accelerator.value
    try:
        carry = stack.enter_context(open_network(find_network(), f"{track.machine.name}-net", accelerator))
    except VshError as error:
        track.failures.append(f"{FORWARD_TCP}: {NETWORK}: {error.brief}")
        return {}
    return {NETWORK: Transfer(carry, size)}


def _time_socat(track: Track, size: int) -> float:
    """Times the paper's way: two socat, one between TCP and vsock here, one between vsock and TCP there."""
    # A half-close must outlive what is still under way: socat's own patience (-t) is half a second.
    there = [
        *track.vsh,
        "--",
        "socat",
        "-t",
        "30",
        f"VSOCK-LISTEN:{RELAY_PORT + 10},reuseaddr",
        f"TCP:127.0.0.1:{SINK_PORT}",
    ]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with Running(there), _connect_soon(lambda: track.connect(RELAY_PORT + 10)) as back:
        # Where vsock is a UNIX socket, its CONNECT line is not socat's to say: it gets the connection as a descriptor.
        back.setblocking(True)
        listen = f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr"
        here = ["socat", "-t", "30", listen, f"FD:{back.fileno()},shut-down"]
        with Running(here, pass_fds=[back.fileno()]):
            return time_sending(_connect_soon(lambda: _connect(port)), size)


def _open_port(stack: contextlib.ExitStack, track: Track, target: str) -> int:
    """Returns a port here that `vsh -N -L` forwards."""
    from vmkit.forward.start import open_forwards  # noqa: PLC0415 - one heat's

    kept = stack.enter_context(open_forwards(track.machine.name, [parse_forward(LOCAL, f"0:{target}")]))
    return int(kept.listening[0].rpartition(":")[2])


def _open_ssh_port(stack: contextlib.ExitStack, track: Track) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    forward = f"127.0.0.1:{port}:127.0.0.1:{SINK_PORT}"
    argv = [track.ssh[0], "-N", "-L", forward, "-o", "ExitOnForwardFailure=yes", *track.ssh[1:]]
    stack.enter_context(Running(argv))
    _connect_soon(lambda: _connect(port)).close()
    return port


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), CONNECT_DEADLINE_S)


def _connect_soon(connect: Callable[[], socket.socket]) -> socket.socket:
    """Connects to a program that does not report when it listens."""
    deadline_s = time.monotonic() + CONNECT_DEADLINE_S
    while True:
        try:
            return connect()
        except (OSError, VshError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _race_boot(track: Track, pace: Pace) -> list[Series]:
    def boot(image: str, memory: str) -> float:
        with Machine(image, name=f"{track.machine.name}-boot", memory=memory, boot=True) as machine:
            return machine.started.seconds

    sides = {
        "tiny: vshd": lambda: boot("tiny", "256M"),
        "bench: vshd, host key, sshd behind vshd --inetd": lambda: boot("bench", "256M"),
    }
    return race(BOOT, sides, pace.boots)


def _weigh(track: Track, pace: Pace) -> list[Series]:
    """Measures the resident memory of the daemons without a session, and the memory that one session adds."""
    with Running([*track.ssh, "sleep", "100"]), Running([*track.vsh, "--", "sleep", "100"]):
        time.sleep(3.0)
        output = track.api.run(["sh", "-c", _LIST_MEMORY]).stdout
    found: dict[str, list[float]] = {}
    for line in output.decode(errors="replace").splitlines():
        kib, _, name = line.partition(" ")
        if kib.isdecimal():
            found.setdefault(name, []).append(int(kib) / 1024)
    here = [(f"host: {name}", pid) for name, pid in _list_host_processes(track)]
    for name, pid in here:
        with contextlib.suppress(OSError, IndexError, ValueError):
            found[name] = [_read_resident_mib(pid)]
    return [Series(MEMORY, name, MIB, (max(values),)) for name, values in sorted(found.items())]


_LIST_MEMORY = r"""
for pid in /proc/[0-9]*; do
    kib=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' $pid/status 2>/dev/null)
    words=$(tr '\0' ' ' < $pid/cmdline 2>/dev/null)
    case "$words" in
        *sshd-session*|*sshd-auth*|"sshd"*) echo "$kib guest: a session of sshd" ;;
        *--inetd*) echo "$kib guest: vshd --inetd (listens for sshd)" ;;
        *pid1.init*) [ ${pid#/proc/} = 1 ] && echo "$kib guest: pid 1" || echo "$kib guest: vshd, a session of it" ;;
    esac
done
"""


def _list_host_processes(track: Track) -> Iterator[tuple[str, int]]:
    """Yields the monitor and its children: the device, and QEMU, which holds the guest's memory."""
    monitor = track.machine.started.monitor.pid
    yield "monitor", monitor
    with open(f"/proc/{monitor}/task/{monitor}/children") as file:  # noqa: PTH123
        for word in file.read().split():
            with open(f"/proc/{word}/cmdline", "rb") as words:  # noqa: PTH123
                if b"vmkit.vsock" in words.read():
                    yield "vsock device", int(word)


def _read_resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
        return int(file.read().partition("VmRSS:")[2].split()[0]) / 1024
