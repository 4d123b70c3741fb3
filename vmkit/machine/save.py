"""Makes snapshots: boots a machine of its own, prepares it where that is asked for, has its monitor save it, and
publishes the result under its key or its name.

Never of a machine that the user started: the save ends every session of it.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmkit.entries.folder import hold_registry, open_runtime_directory
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.image.cache import Cache, open_cache
from vmkit.machine import stop
from vmkit.machine.booted import has_systemd
from vmkit.machine.builders import end_builder, find_builder
from vmkit.machine.choose import Build, Choices, Tell, choose
from vmkit.machine.restore import SNAPSHOTS_VARIABLE, find_facts, find_obstacle, name_image, open_store, render_options
from vmkit.machine.source import take_source
from vmkit.machine.spec import LAST_GUEST_CID, Backend, MachineSpec, check_name
from vmkit.machine.start import Started, start_machine
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.machine.words import SAVED, Save
from vmkit.snapshots.boots import read_boots, write_boots
from vmkit.snapshots.key import describe_difference, make_key
from vmkit.snapshots.pages import DamagedError
from vmkit.snapshots.store import RECORD, Snapshot, read_snapshot, write_record
from vsh.address import address_of
from vsh.client import Client
from vsh.registry import SAVING, Entry, find_machine

# The guest's freeze, its settling, and the writing of its memory on a slow disk.
SAVE_DEADLINE_S = 300.0
# Tells the init of the image `any` that sessions must have a boot id which a thaw can change. It is no fact of the key.
SAVED_ARGUMENT = "vmkit.saved"
# Digits in the name of the machine that is saved.
NAME_DIGITS = 8
CID_DIGITS = 7
# Beside the memory: the state, and what a file system wants for itself.
SPARE_BYTES = 16 << 20


class HasSystemdError(MachineError):
    """pid 1 of the machine that was to be saved is the systemd of its root. The host learns it with READY."""


@dataclass(frozen=True, slots=True)
class Made:
    """A snapshot, and whether it was there already."""

    snapshot: Snapshot
    was_there: bool
    seconds: float


def make_snapshot(
    spec: MachineSpec,
    *,
    name: str = "",
    commands: Sequence[str] = (),
    tell: Tell | None = None,
    build: Build | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Made:
    """Makes the snapshot of exactly this machine, unless it is there.

    name: keep it under this name instead, for `vmkit up --snapshot`. commands: run in the guest first, by its sh, each
    of which must succeed. build: as for start_machine(). on_wait: called with the key if another process makes this
    very snapshot, before the wait for it. By default a builder in the background ends then: it has too low a priority
    to be waited for. Raises VshError kinds; nothing is left behind then.
    """
    say = tell or (lambda _text, _fraction: None)
    wait = on_wait or (lambda key: _take_over(key, say))
    started_s = time.monotonic()
    spec = replace(spec, boot=True, snapshot=None, name=None, cid=None, token=False)
    spec = take_source(spec, say)
    choices = choose(spec, say, KernelVhostDoor(), build)
    _check_choices(spec, choices, name)
    facts = find_facts(spec, choices)
    key = make_key(facts)
    store = open_store()
    final = store.find_named(check_name(name)) if name else store.find_made(key)
    with (
        open_cache(store.folder, "snapshots", SNAPSHOTS_VARIABLE) as cache,
        cache.locked(name or key, lambda: wait(key)),
    ):
        cache.sweep()
        if name and final.exists():
            raise MachineError(f"there is a snapshot '{name}' already", hint=f"vmkit snapshot rm {name}")
        there = _find_whole(final)
        if there is not None:
            return Made(there, True, time.monotonic() - started_s)
        with cache.temporary_dir() as folder:
            new = folder / "snapshot"
            new.mkdir(mode=0o700)
            check_room(store.folder, spec)
            saved = _save(_plan_machine(spec, choices, final), new, commands, say, build)
            _check_unchanged(facts, find_facts(spec, saved.choices))
            _complete(new, key, name_image(spec, choices), facts, spec if name else None)
            _publish(cache, new, final)
        store.prune(keep=key)
        _forget_boots(store.folder, key)
    return Made(read_snapshot(final), False, time.monotonic() - started_s)


def _check_choices(spec: MachineSpec, choices: Choices, name: str) -> None:
    """Raises ConfigError for a machine that cannot be saved, or that cannot have a name for its snapshot."""
    if name and choices.built.takes_root:
        raise ConfigError(
            "a snapshot with a name is of an image, and not of a root of yours",
            hint="vmkit snapshot make saves a machine of a root, and vmkit up starts from it",
        )
    obstacle = find_obstacle(spec, choices)
    if obstacle:
        raise ConfigError(f"no snapshot of this machine can be made: {obstacle}")


def _plan_machine(spec: MachineSpec, choices: Choices, final: Path) -> MachineSpec:
    """The machine that is saved for the snapshot in this folder."""
    name = name_machine(final)
    # The last CIDs: the first are those that people type. On `vhost` the kernel knows which are free.
    is_free = choices.backend is Backend.USER
    cid = LAST_GUEST_CID - int(name[-CID_DIGITS:], 16) if is_free else None
    append = f"{spec.append} {SAVED_ARGUMENT}".strip() if choices.built.takes_root else spec.append
    return replace(spec, name=name, cid=cid, append=append)


def name_machine(final: Path) -> str:
    """The name of the machine that is saved for the snapshot in this folder.

    By the folder: several processes at once may save equal machines under several names.
    """
    return SAVING + hashlib.sha256(os.fsencode(final)).hexdigest()[:NAME_DIGITS]


def _take_over(key: str, say: Tell) -> None:
    builder = find_builder(key)
    if builder is None:
        say("waiting", None)
        return
    say("ending the process that makes this snapshot in the background", None)
    end_builder(builder)


def _forget_boots(folder: Path, key: str) -> None:
    """What was counted before the snapshot, and why there was none, is of no more interest."""
    with hold_registry(open_runtime_directory()):
        known = read_boots(folder)
        if known.pop(key, None) is not None:
            write_boots(folder, known)


def _find_whole(folder: Path) -> Snapshot | None:
    """The snapshot in a folder; one that is damaged is removed."""
    try:
        return read_snapshot(folder)
    except FileNotFoundError:
        return None
    except DamagedError:
        open_store().remove(folder)
        return None


def check_room(folder: Path, spec: MachineSpec) -> None:
    """Raises HostError if the memory, were all of it in use, would not fit on the disk of the snapshots' folder."""
    free = os.statvfs(folder)
    needed = (spec.memory_mib << 20) + SPARE_BYTES
    if free.f_bavail * free.f_frsize < needed:
        raise HostError(
            f"the disk of {folder} has too little room for a snapshot of {spec.memory_mib} MiB",
            hint=f"vmkit snapshot prune, or name another folder: {SNAPSHOTS_VARIABLE}=DIR",
        )


def _check_unchanged(before: dict[str, object], after: dict[str, object]) -> None:
    """Raises MachineError where what the key is made of is not what the machine had."""
    changed = describe_difference(before, after)
    if changed:
        raise MachineError(f"no snapshot was made: {changed} changed meanwhile", hint="run it again")


def _save(spec: MachineSpec, folder: Path, commands: Sequence[str], say: Tell, build: Build | None) -> Started:
    started = start_machine(spec, tell=say, build=build, is_owned=True)
    try:
        entry = _find_entry(started)
        if has_systemd(entry):
            raise HasSystemdError(
                "no snapshot of this machine can be made: its pid 1 is the systemd of its root",
                hint="vmkit up boots it at each start",
            )
        for command in commands:
            say(f"running {command}", None)
            Client(address_of(entry)).run(["sh", "-c", command], check=True)
        say("saving", None)
        _await_save(entry, folder)
    finally:
        left = find_machine(name=started.name)
        if left is not None and left.pid == started.monitor.pid:
            stop.kill(left)
        with contextlib.suppress(OSError):
            started.monitor.wait(stop.KILL_DEADLINE_S)
    return started


def _find_entry(started: Started) -> Entry:
    entry = find_machine(name=started.name)
    if entry is None or entry.pid != started.monitor.pid:
        raise MachineError(f"'{started.name}' ended before it was saved")
    return entry


def _await_save(entry: Entry, folder: Path) -> None:
    with stop.open_control(entry) as control:
        answer = control.ask(Save(str(folder)), SAVE_DEADLINE_S)
        if not answer.ok:
            raise MachineError(f"the monitor refused to save '{entry.name}': {answer.error}")
        ended = control.wait_end(SAVE_DEADLINE_S)
    if ended is None:
        raise MachineError(f"'{entry.name}' was not saved within {SAVE_DEADLINE_S:g} s")
    if ended.reason != SAVED:
        hint = "" if ended.expected else f"the logs are kept: vmkit logs {entry.name}"
        raise MachineError(f"'{entry.name}' was not saved: {ended.brief}", hint=hint)


def _complete(folder: Path, key: str, image: str, facts: dict[str, object], named: MachineSpec | None) -> None:
    """Adds to the monitor's record what the snapshot depends on. named: the machine of a snapshot with a name."""
    record = read_snapshot(folder).record
    options = {} if named is None else render_options(named)
    (folder / RECORD).unlink()
    record = replace(record, key=key, image=image, facts=facts, made=round(time.time(), 3), options=options)
    write_record(folder, record)


def _publish(cache: Cache, new: Path, final: Path) -> None:
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.adopt(new, final)
