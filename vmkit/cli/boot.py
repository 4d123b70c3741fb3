"""Runs `vmkit up`: makes a ready machine from a spec, and prints the next command to type."""

import contextlib
import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmkit.builder.setting import is_allowed
from vmkit.cli.show import CleanWriter, open_progress, print_json, read_wall
from vmkit.errors import NameInUseError
from vmkit.image.build import find_built_image, plan_image, prepare
from vmkit.machine.argv import QemuPlan
from vmkit.machine.booted import has_systemd
from vmkit.machine.choose import Choices, choose, find_image, plan_hardware
from vmkit.machine.handover import MonitorHandle
from vmkit.machine.launch import Layout
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.running import pick_entry
from vmkit.machine.spec import FIRST_GUEST_CID, MachineSpec
from vmkit.machine.start import Started, start_machine
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.run import render_command
from vsh.address import address_of
from vsh.registry import MACHINES, Entry, find_machine, find_runtime_directory

CONSOLE_POLL_S = 0.05
# The registry is files; it announces nothing.
READY_POLL_S = 0.1
READY, PAUSED, POOLED = "ready", "paused", "pooled"
READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Show:
    """What `up` shows of a start. waits_booted: it waits for the guest's systemd, and prints no JSON before."""

    console: bool = False
    as_json: bool = False
    quiet: bool = False
    waits_booted: bool = False


def boot(spec: MachineSpec, monitor: MonitorHandle | None, show: Show) -> dict[str, object]:
    """Starts a machine and prints it. Returns the answer of `up --json`. monitor: one that was started already."""
    # A wrong value is refused before anything is started.
    may_build = is_allowed()
    if spec.gdb_port is not None:
        print(
            f"vmkit: warning: every user of this host can control the guest through port {spec.gdb_port}; "
            "--gdb alone serves a socket that only you can open",
            file=sys.stderr,
            flush=True,
        )
    if show.console and spec.snapshot is None:
        # The console is there to show a boot.
        spec = replace(spec, boot=True)
    with contextlib.ExitStack() as stack:
        follow = stack.enter_context(_follow_console()) if show.console else None
        tell = stack.enter_context(open_progress(quiet=show.quiet or show.console))
        started = start_machine(spec, tell=tell, on_directory=follow, monitor=monitor)
    is_building = may_build and not spec.boot and _note_boot(spec, started)
    answer = render_json(started)
    if not show.as_json:
        _print_started(started, spec.root_from, quiet=show.quiet, is_building=is_building)
    elif not show.waits_booted:
        print_json(answer)
    # While the machine can still be undone: if its name cannot be printed, it must not stay.
    sys.stdout.flush()
    return answer


def await_booted(answer: dict[str, object], timeout_s: float, show: Show) -> None:
    """Waits for the systemd of a machine that `up` has started or found, and prints how its boot ended.

    Raises MachineError at the deadline.
    """
    from vmkit.machine.booted import wait_booted  # noqa: PLC0415 - most guests have no systemd

    with open_progress(quiet=show.quiet) as tell:
        tell("waiting for the guest's systemd", None)
        booted = wait_booted(pick_entry(str(answer["name"])), timeout_s)
    if show.as_json:
        print_json(answer | {"booted": asdict(booted)})
    else:
        print(f"{answer['name']} has booted: {booted.render()}", flush=True)


def _note_boot(spec: MachineSpec, started: Started) -> bool:
    """Counts a boot. Returns whether a snapshot is made in the background now."""
    entry = find_machine(name=started.name)
    if started.started_by != "boot" or (entry is not None and has_systemd(entry)):
        return False
    if spec.source:
        # The disk that was made of it.
        spec = replace(spec, root=started.choices.root)
    from vmkit.builder.start import note_boot  # noqa: PLC0415 - most starts are from a snapshot

    return note_boot(spec, started.choices)


def boot_or_reuse(spec: MachineSpec, monitor: MonitorHandle | None, show: Show) -> dict[str, object]:
    """Prints the machine of spec's name, and starts it if there is none. Of several that call this at once, one
    starts the machine, and the others wait until it is ready. Raises NotReady when that takes too long.
    """
    deadline_s = time.monotonic() + spec.timeout_s
    while True:
        entry = _await_ready(spec.name, deadline_s, quiet=show.quiet)
        if entry is not None:
            return print_running(entry, show)
        try:
            return boot(spec, monitor, show)
        except NameInUseError:
            # Another was faster.
            continue


def _await_ready(name: str | None, deadline_s: float, *, quiet: bool) -> Entry | None:
    """Waits for that machine to be ready, or for the deadline, and returns it. None: it does not exist, or ended.

    A paused machine is not waited for: only a person resumes it. One of a pool is for a taker.
    """
    is_told = quiet
    while True:
        entry = find_machine(name=name)
        if entry is None or entry.state in (READY, PAUSED, POOLED) or time.monotonic() > deadline_s:
            return entry
        if not is_told:
            print(f"vmkit: waiting for '{entry.name}', which is {entry.state}", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(READY_POLL_S)


def render_json(started: Started) -> dict[str, object]:
    """Returns the answer of `up --json`."""
    choices = started.choices
    return {
        "name": started.name,
        "cid": started.cid,
        "image": choices.built.name,
        "architecture": choices.built.architecture,
        "accelerator": choices.accelerator.value,
        "accelerator_reason": choices.accelerator_reason,
        "backend": choices.backend.value,
        "backend_reason": choices.backend_reason,
        "wall": _find_wall(started.name),
        "seconds": round(started.seconds, 3),
        "started_by": started.started_by,
        "snapshot": started.snapshot,
        "directory": str(started.directory),
        "shell": ["vsh", "--cid", str(started.cid)],
        "gdb": started.gdb,
    }


def _find_wall(name: str) -> dict[str, str]:
    entry = find_machine(name=name)
    return {} if entry is None else read_wall(entry.record)


def print_running(entry: Entry, show: Show) -> dict[str, object]:
    address_of(entry)
    answer = {**entry.record, "directory": entry.directory, "shell": ["vsh", "--cid", str(entry.cid)]}
    if not show.as_json:
        gdb = entry.record.get("gdb")
        _print_whole(
            f"{entry.name} is running already: CID {entry.cid}",
            *_list_next(entry.name, entry.cid, None if gdb is None else str(gdb)),
        )
    elif not show.waits_booted:
        print_json(answer)
    return answer


def _print_whole(*lines: str) -> None:
    """In one piece: `up | head -1` must find a reader for all of it, also where PYTHONUNBUFFERED is set."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _list_next(name: str, cid: int, gdb: str | None, vmlinux: Path | None = None) -> Iterator[str]:
    yield f"a shell:  {_find_command('vsh')} --cid {cid}"
    if gdb is not None and vmlinux is not None:
        yield f"gdb:      gdb {shlex.quote(str(vmlinux))} -ex {shlex.quote(f'target remote {gdb}')}"
    elif gdb is not None:
        yield f"in gdb:   target remote {gdb}"
    yield f"stop it:  {_find_command('vmkit')} down {shlex.quote(name)}"


def _find_command(program: str) -> str:
    """Returns `program` as a person types it: its name when it is on PATH, else the path beside this program."""
    if shutil.which(program):
        return program
    beside = Path(sys.argv[0]).parent / program
    if not beside.exists():
        return program
    try:
        return shlex.quote(os.path.relpath(beside))
    except FileNotFoundError:
        # The working directory is gone.
        return shlex.quote(str(beside))


def _print_started(started: Started, root_from: Path | None, *, quiet: bool, is_building: bool) -> None:
    choices = started.choices
    lines = [
        f"{started.name} is ready: CID {started.cid}, accelerator {choices.accelerator}, "
        f"backend {choices.backend}, {_render_start(started)}"
    ]
    if not quiet:
        lines += _list_choices(started, root_from)
        if is_building:
            lines.append("  a snapshot is made in the background; the next start is quicker")
        lines += _list_next(started.name, started.cid, started.gdb, choices.vmlinux)
    _print_whole(*lines)


def _list_choices(started: Started, root_from: Path | None) -> Iterator[str]:
    choices = started.choices
    if choices.accelerator_reason:
        yield f"  no KVM: {choices.accelerator_reason}"
    if choices.backend_reason:
        yield f"  no vhost: {choices.backend_reason}"
    if root_from is not None:
        yield f"  the root is {root_from} of this host, read-only, by {choices.root_type}"
        if choices.live is not None and choices.live.reason:
            yield f"  no virtiofs: {choices.live.reason}"
    for layer, state in _find_wall(started.name).items():
        if state not in ("on", "off"):
            yield f"  the wall's {layer} layer is {state}"


def _render_start(started: Started) -> str:
    if started.snapshot is None:
        return f"{started.seconds:.1f} s"
    return f"{started.seconds:.1f} s from the snapshot {started.snapshot}"


def print_plan(spec: MachineSpec, *, as_json: bool) -> None:
    """Prints the image's plan, and QEMU's command if the image is in the cache: its paths are unknown before.

    Starts no machine, not even to prove KVM.
    """
    image = prepare(find_image(spec))
    plan = plan_image(image).render()
    choices, qemu = _plan_start(spec) if find_built_image(image) is not None else (None, None)
    if as_json:
        by_hand = None if qemu is None else qemu.render_by_hand()
        plug = [] if qemu is None else [{"execute": c.name, "arguments": c.arguments} for c in qemu.plug]
        print_json({"image": plan, "qemu": by_hand, "plug": plug})
        return
    print(plan)
    if choices is None or qemu is None:
        print("# QEMU's command is known when the image is built: vmkit build")
        return
    print(f"# accelerator {_render_choice(choices.accelerator, choices.accelerator_reason)}")
    print(f"# backend {_render_choice(choices.backend, choices.backend_reason)}")
    print("# QEMU, with the guest's console in your terminal (Ctrl-a x ends it) and without the vsock device:")
    print(render_command(qemu.render_by_hand()))
    print("# vmkit starts it paused, plugs the device over QMP, and lets it run:")
    for command in qemu.plug:
        print(f"#   {command.name} {json.dumps(command.arguments)}")


def _render_choice(choice: str, reason: str) -> str:
    return f"{choice}: {reason}" if reason else choice


def _plan_start(spec: MachineSpec) -> tuple[Choices, QemuPlan]:
    choices = choose(spec, lambda _text, _fraction: None, KernelVhostDoor(), prove=False)
    name, cid = spec.name or choices.built.name, spec.cid or FIRST_GUEST_CID
    directory = Path(find_runtime_directory()) / MACHINES / name
    return choices, plan_qemu(plan_hardware(spec, choices, name, cid, directory))


@contextlib.contextmanager
def _follow_console() -> Iterator[Callable[[Path], None]]:
    """Copies the console log to stderr as it grows, until the block ends. Yields a function of the log's directory."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def follow(directory: Path) -> None:
        thread = threading.Thread(target=_copy_growing, args=(directory / Layout.CONSOLE_LOG, stop), daemon=True)
        thread.start()
        threads.append(thread)

    try:
        yield follow
    finally:
        stop.set()
        for thread in threads:
            thread.join(1.0)


def _copy_growing(path: Path, stop: threading.Event) -> None:
    writer = CleanWriter(sys.stderr)
    fd = -1
    while True:
        last = stop.wait(CONSOLE_POLL_S)
        with contextlib.suppress(OSError):
            if fd < 0:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while data := os.read(fd, READ_BYTES):
                writer.write(data)
        if last:
            writer.finish()
            break
    if fd >= 0:
        os.close(fd)
