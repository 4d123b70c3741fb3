"""Counts the boots of `vmkit up`, and starts a builder when a snapshot is due: at the second boot with the same key."""

import contextlib
import logging
import os
import pickle
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vmkit.builder.order import LENGTH_BYTES, BuildOrder
from vmkit.entries.folder import explain_errors, hold_registry, open_runtime_directory
from vmkit.image.cache import open_cache
from vmkit.machine.builders import add_builder
from vmkit.machine.choose import Choices
from vmkit.machine.probe import read_available_memory_mib
from vmkit.machine.programs import start_program
from vmkit.machine.restore import SNAPSHOTS_VARIABLE, find_facts, find_obstacle, name_image, open_store
from vmkit.machine.save import check_room, name_machine
from vmkit.machine.spec import Backend, MachineSpec
from vmkit.snapshots.boots import Boots, count_boot, read_boots, write_boots
from vmkit.snapshots.key import make_key
from vmkit.snapshots.store import Store
from vsh.errors import VshError

log = logging.getLogger("vmkit")

# In the folder of the snapshots; of the last builder.
LOG = "background.log"
# What QEMU, monitor and builder take beside the guest's memory, and what the host keeps.
BESIDE_MIB, SPARE_MIB = 128, 512
# A boot at the lowest priority, on a host that is busy.
BOOT_DEADLINE_S = 900.0
SEND_DEADLINE_S = 10.0


def note_boot(spec: MachineSpec, choices: Choices) -> bool:
    """Counts a boot of this machine, and starts a builder if a snapshot is due. Returns whether it did.

    The machine runs already, so nothing here is an error of its start.
    """
    try:
        return _note_boot(spec, choices)
    except (VshError, OSError) as error:
        log.debug("no snapshot is made in the background: %s", error)
        return False


@dataclass(frozen=True, slots=True)
class _Plan:
    """A snapshot to make."""

    spec: MachineSpec
    choices: Choices
    key: str
    store: Store


def _note_boot(spec: MachineSpec, choices: Choices) -> bool:
    obstacle = find_obstacle(spec, choices)
    if choices.backend is not Backend.USER:
        # Its CIDs are the host's, and its machines are most often quick to boot.
        obstacle = f"the backend is {choices.backend}"
    if obstacle:
        log.debug("no snapshot is made in the background: %s", obstacle)
        return False
    plan = _Plan(spec, choices, make_key(find_facts(spec, choices)), open_store())
    root = open_runtime_directory()
    with open_cache(plan.store.folder, "snapshots", SNAPSHOTS_VARIABLE) as cache:
        # A builder that was killed may have left half a snapshot.
        cache.sweep()
        with explain_errors(root), hold_registry(root):
            if not _count(plan).is_due(time.time()):
                return False
            if plan.store.find_made(plan.key).exists() or not _has_room(plan):
                return False
            return _start(plan, root)


def _count(plan: _Plan) -> Boots:
    """The boots with the key of this machine, this one included."""
    folder = plan.store.folder
    image = name_image(plan.spec, plan.choices)
    known = count_boot(read_boots(folder), plan.key, image, plan.spec.memory_mib, time.time())
    write_boots(folder, known)
    return known[plan.key]


def _has_room(plan: _Plan) -> bool:
    needed_mib, available_mib = plan.spec.memory_mib + BESIDE_MIB + SPARE_MIB, read_available_memory_mib()
    if available_mib and available_mib < needed_mib:
        log.debug("no snapshot is made in the background: %d MiB are available, of %d", available_mib, needed_mib)
        return False
    check_room(plan.store.folder, plan.spec)
    return True


def _start(plan: _Plan, root: Path) -> bool:
    record = {
        "image": name_image(plan.spec, plan.choices),
        "memory_mib": plan.spec.memory_mib,
        "machine": name_machine(plan.store.find_made(plan.key)),
    }
    is_started = add_builder(root, plan.key, record, lambda lock_fd: _start_process(plan, lock_fd))
    log.debug("a snapshot is %s", "made in the background" if is_started else "due, and another one is being made")
    return is_started


def _start_process(plan: _Plan, lock_fd: int) -> int:
    spec = replace(
        plan.spec,
        accelerator=plan.choices.accelerator,
        backend=plan.choices.backend,
        timeout_s=BOOT_DEADLINE_S,
    )
    # From here: relative paths in the environment lead elsewhere in another directory.
    order = pickle.dumps(BuildOrder(spec, plan.choices.built, plan.key, str(Path.cwd())))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        log_fd = os.open(plan.store.folder / LOG, flags, 0o600)
        stack.callback(os.close, log_fd)
        ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
        process = start_program("vmkit.builder", theirs, log_fd)
        try:
            ours.settimeout(SEND_DEADLINE_S)
            # The descriptor comes with the first byte. It is all that the builder has of this process.
            socket.send_fds(ours, [len(order).to_bytes(LENGTH_BYTES, "little")], [lock_fd])
            ours.sendall(order)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process.pid
