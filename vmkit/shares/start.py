"""Starts and ends the processes that serve shares."""

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator

from vmkit.errors import HostError, MachineError
from vmkit.machine.handover import end_by_entry, end_program, start_program
from vmkit.shares.place import SharedPlace, check_folder
from vmkit.shares.registry import LiveShare, parse_share, read_shares
from vsh.errors import VshError

# Its interpreter, and the guest's answer.
START_DEADLINE_S = 60.0
# It closes what the guest has open, and goes.
MAX_ANSWER_BYTES = 1 << 16


def start_share(machine: str, place: SharedPlace) -> LiveShare:
    """Shares a folder with the machine of that name. Returns when the guest has it. Raises VshError kinds.

    The share ends with the machine, when the guest unmounts it, or by end_share().
    """
    check_folder(place)
    for share in read_shares(machine):
        if share.guest == place.guest:
            raise MachineError(
                f"{machine} has {share.host} at {share.guest} already",
                hint=f"choose another place, or end that share: vmkit unshare {machine} {share.guest}",
            )
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start_program("vmkit.shares.daemon", theirs, subprocess.DEVNULL)
        try:
            return _meet(ours, machine, place)
        except BaseException:
            end_program(process)
            raise


@contextlib.contextmanager
def open_share(machine: str, place: SharedPlace) -> Iterator[LiveShare]:
    """Shares a folder for as long as the block lasts."""
    share = start_share(machine, place)
    try:
        yield share
    finally:
        end_share(share)


def end_share(share: LiveShare) -> None:
    """Ends a share: who uses it in the guest gets an error. Raises MachineError when its process does not end."""
    if not end_by_entry(share.pid, lambda: share in read_shares()):
        raise MachineError(f"the process {share.pid} of share {share.number} does not end")


def _meet(ours: socket.socket, machine: str, place: SharedPlace) -> LiveShare:
    request = {"machine": machine, "host": str(place.host), "guest": place.guest, "read_only": place.read_only}
    ours.settimeout(START_DEADLINE_S)
    try:
        ours.sendall(json.dumps(request).encode() + b"\n")
        with ours.makefile("rb") as answers:
            line = answers.readline(MAX_ANSWER_BYTES)
    except OSError as error:
        raise HostError("the process of the share does not answer") from error
    if not line:
        raise HostError("the process of the share ended at once", hint="`python3 -m vmkit.shares.daemon` prints why")
    answer = json.loads(line)
    if "error" in answer:
        raise VshError(**answer["error"])
    return parse_share(answer)
