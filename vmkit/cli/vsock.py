"""The verbs `vmkit vsock ...`: the packets of a machine's vsock device, and faults that it brings about."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import click

from vmkit.cli.show import print_json, print_table
from vmkit.cli.values import COUNT, VSOCK_PORT, Number, complete_machines
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.running import pick_entry
from vmkit.packets.control import DeviceControl, open_control
from vmkit.packets.lines import OP_NAMES, render_json, render_line
from vmkit.packets.pcap import encode_file_header, encode_packet
from vmkit.vsock.records import Captured
from vmkit.vsock.requests import (
    DIRECTIONS,
    FAULT_KINDS,
    MAX_COUNT,
    MAX_DELAY_MS,
    MAX_PORTS,
    MAX_SNAPLEN_BYTES,
    Clear,
    Fault,
    Kill,
    ListFaults,
    RequestError,
    TraceRequest,
    check_fault,
)
from vsh.registry import Entry

USER = "user"
CLEAR = "clear"
KILL = "kill"
DEEDS = (*FAULT_KINDS, KILL, CLEAR)

control_option = click.option(
    "--control", type=click.Path(path_type=Path), metavar="SOCKET", help="A device started by hand: its control socket."
)
port_option = click.option(
    "--port", "ports", type=VSOCK_PORT, multiple=True, metavar="PORT", help="A port of either side (repeatable)."
)
direction_option = click.option("--direction", type=click.Choice(DIRECTIONS), help="One direction alone.")


@click.group("vsock", context_settings={"help_option_names": ["-h", "--help"]})
def vsock() -> None:
    """Watch the packets of a machine's vsock device, and bring about faults.

    It works with the backend `user`, and with `vmkit device vsock --control PATH`.
    """


@vsock.command("trace")
@click.argument("name", required=False, shell_complete=complete_machines)
@port_option
@click.option("--op", "ops", type=click.Choice(tuple(OP_NAMES)), multiple=True, help="An operation (repeatable).")
@direction_option
@click.option("--count", type=COUNT, metavar="COUNT", help="End after so many packets.")
@click.option("--recent", is_flag=True, help="Print the last packets before now, and end. They have no payload.")
@click.option(
    "--snaplen",
    type=Number("bytes", 0, MAX_SNAPLEN_BYTES),
    metavar="BYTES",
    help=f"Take so many bytes of each payload [default: 0; with --pcap {MAX_SNAPLEN_BYTES}].",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each packet.")
@click.option("--pcap", metavar="FILE", help="Write a file for Wireshark instead; `-` is stdout.")
@control_option
def trace(
    *,
    name: str | None,
    ports: tuple[int, ...],
    ops: tuple[str, ...],
    direction: str | None,
    count: int | None,
    recent: bool,
    snaplen: int | None,
    as_json: bool,
    pcap: str | None,
    control: Path | None,
) -> None:
    """Print each packet of a machine's vsock device, until Ctrl-C.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    The device never waits for this program. When packets come faster than they are read, it drops some, and a line
    reports how many.
    """
    if as_json and pcap is not None:
        raise ConfigError("give --json or --pcap, not both")
    if recent and snaplen:
        raise ConfigError("--recent takes no --snaplen: the device keeps headers alone")
    if snaplen is None:
        snaplen = 0 if pcap is None else MAX_SNAPLEN_BYTES
    wanted = TraceRequest(_check_ports(ports), tuple(OP_NAMES[op] for op in ops), direction or "", snaplen)
    with _open_device(name, control) as device:
        packets = iter(_pick_recent(device, wanted, count)) if recent else device.follow(wanted)
        if pcap is not None:
            is_whole = _write_pcap(packets, pcap, count)
        else:
            render = render_json if as_json else render_line
            is_whole = _take(packets, count, lambda packet: print(render(packet), flush=True))
    if not (is_whole or recent):
        print("vmkit: the vsock device has ended", file=sys.stderr)


def _complete_deeds(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    return [deed for deed in DEEDS if deed.startswith(incomplete)]


def _complete_name(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return complete_machines(context, param, incomplete) + _complete_deeds(context, param, incomplete)


@vsock.command("fault")
@click.argument("name", required=False, shell_complete=_complete_name)
@click.argument("kind", required=False, shell_complete=_complete_deeds)
@port_option
@direction_option
@click.option("--ms", type=Number("milliseconds", 1, MAX_DELAY_MS), metavar="MILLISECONDS", help="delay: how long.")
@click.option("--rate", type=Number("bytes", 1, MAX_COUNT), metavar="BYTES", help="rate: bytes a second.")
@click.option(
    "--after",
    type=Number("bytes", 0, MAX_COUNT),
    metavar="BYTES",
    help="reset, half-close, freeze-credit: once a connection has carried so many bytes.",
)
@click.option("--times", type=COUNT, metavar="COUNT", help="Hit so many connections, and no more.")
@click.option("--number", type=COUNT, metavar="NUMBER", help="clear: this fault alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@control_option
def fault(
    *,
    name: str | None,
    kind: str | None,
    ports: tuple[int, ...],
    direction: str | None,
    ms: int | None,
    rate: int | None,
    after: int | None,
    times: int | None,
    number: int | None,
    as_json: bool,
    control: Path | None,
) -> None:
    """Bring about a fault in a machine's vsock device, or list the active ones.

    NAME is a machine's name or CID. With one machine running, you can leave it out. Without KIND, it lists.

    \b
    delay          Each byte comes --ms later.
    rate           Each connection carries --rate bytes a second.
    reset          Open connections end now; with --after, each one later.
    freeze-credit  No credit passes, so a sender comes to a stop.
    half-close     One --direction of the open connections ends now.
    refuse         The device refuses new connections.
    kill           The device process ends. The monitor starts another.
    clear          All faults end, or the one with --number.
    """
    if kind is None and (name in DEEDS or control is not None):
        name, kind = None, name
    if kind is not None and kind not in DEEDS:
        raise ConfigError(f"there is no fault '{kind}'", hint=f"kinds: {', '.join(DEEDS)}")
    if number and kind != CLEAR:
        raise ConfigError("--number goes with clear")
    wanted = None
    if kind in FAULT_KINDS:
        values = (direction or "", ms or 0, rate or 0, -1 if after is None else after, times or 0)
        wanted = Fault(kind, _check_ports(ports), *values)
        try:
            check_fault(wanted)
        except RequestError as error:
            raise ConfigError(str(error), hint=_HINTS.get(kind, "")) from error
    elif ports or any(value is not None for value in (direction, ms, rate, after, times)):
        raise ConfigError(f"{kind or 'the list of faults'} takes no such options")
    with _open_device(name, control) as device:
        _do(device, kind, wanted, number or 0, as_json=as_json)


_HINTS = {
    "delay": "give --ms N",
    "rate": "give --rate BYTES",
    "half-close": "give --direction to-guest or --direction to-host",
}


def _do(device: DeviceControl, kind: str | None, wanted: Fault | None, number: int, *, as_json: bool) -> None:
    faults: list[Fault] = []
    match kind:
        case "kill":
            device.ask(Kill())
        case "clear":
            device.ask(Clear(number))
        case _:
            faults = device.ask_faults(ListFaults() if wanted is None else wanted)
    if as_json:
        print_json([fault._asdict() for fault in faults])
    elif wanted is not None and not faults[0].number:
        print(f"{wanted.kind}: {faults[0].hits} connections")
    elif faults:
        print_table(("NUMBER", "KIND", "PORTS", "DIRECTION", "VALUE", "HITS"), [_render_row(one) for one in faults])
    elif kind is None:
        print("no fault is active", file=sys.stderr)


def read_faults(entry: Entry) -> list[Fault]:
    """The active faults of a machine's device; none where no device of ours answers."""
    if entry.backend == USER:
        with contextlib.suppress(MachineError), open_control(Path(entry.directory) / Layout.VSOCK_CONTROL) as device:
            return device.ask_faults(ListFaults())
    return []


def render_fault(fault: Fault) -> str:
    """A fault as `vmkit status` prints it."""
    ports = [f"port {port}" for port in fault.ports]
    return ", ".join([fault.kind, *filter(None, (_render_value(fault), fault.direction)), *ports])


def _render_row(fault: Fault) -> tuple[str, ...]:
    hits = f"{fault.hits} of {fault.times}" if fault.times else str(fault.hits)
    ports = ",".join(map(str, fault.ports)) or "all"
    return str(fault.number), fault.kind, ports, fault.direction or "both", _render_value(fault), hits


def _render_value(fault: Fault) -> str:
    if fault.delay_ms:
        return f"{fault.delay_ms} ms"
    if fault.bytes_s:
        return f"{fault.bytes_s} bytes/s"
    return f"after {fault.after} bytes" if fault.after >= 0 else ""


def _check_ports(ports: tuple[int, ...]) -> tuple[int, ...]:
    if len(ports) > MAX_PORTS:
        raise ConfigError(f"--port: give at most {MAX_PORTS}, not {len(ports)}")
    return tuple(ports)


@contextlib.contextmanager
def _open_device(name: str | None, control: Path | None) -> Iterator[DeviceControl]:
    if control is not None and name is not None:
        raise ConfigError("give a machine or --control, not both")
    if control is None:
        entry = pick_entry(name)
        if entry.backend != USER:
            raise ConfigError(
                f"the vsock device of '{entry.name}' is the kernel's (backend {entry.backend})",
                hint="start the machine with --backend user",
            )
        control = Path(entry.directory) / Layout.VSOCK_CONTROL
    with open_control(control) as device:
        yield device


def _pick_recent(device: DeviceControl, wanted: TraceRequest, count: int | None) -> list[Captured]:
    """The last packets that match: `count` of them at most."""
    found = []
    for packet in device.ask_recent():
        header = packet.header
        if header and wanted.matches(header.op, header.src_port, header.dst_port, is_from_guest=packet.is_from_guest):
            found.append(packet)
    return found if count is None else found[-count:]


def _take(packets: Iterator[Captured], count: int | None, use: Callable[[Captured], None]) -> bool:
    """Uses packets until there are so many, and then returns True. (Ctrl-C ends the program.)"""
    taken = 0
    for packet in packets:
        use(packet)
        taken += packet.header is not None
        if count is not None and taken >= count:
            return True
    return False


def _write_pcap(packets: Iterator[Captured], path: str, count: int | None) -> bool:
    """Writes packets until there are so many, and then returns True."""
    written = dropped = 0
    try:
        with _open_output(path) as file:
            file.write(encode_file_header())
            file.flush()

            def write(packet: Captured) -> None:
                nonlocal written, dropped
                dropped += packet.dropped
                if packet.header is not None:
                    file.write(encode_packet(packet.time_ns, packet.header, packet.payload))
                    file.flush()
                    written += 1

            try:
                return _take(packets, count, write)
            finally:
                # Also after Ctrl-C.
                print(f"{written} packets, {dropped} more were dropped", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _open_output(path: str) -> Iterator[BinaryIO]:
    """The file, for its owner alone: it has what programs sent."""
    if path == "-":
        yield sys.stdout.buffer
        return
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:  # noqa: PTH123
        yield file
