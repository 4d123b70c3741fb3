"""Starts and ends the processes that serve shares."""

import contextlib
import shlex
from collections.abc import Iterator

from vmkit.errors import MachineError
from vmkit.machine.programs import end_by_entry, start_and_ask
from vmkit.shares.place import SharedPlace, check_folder
from vmkit.shares.registry import LiveShare, parse_share, read_shares


def start_share(machine: str, place: SharedPlace, by: str = "") -> LiveShare:
    """Shares a folder with the machine of that name. Returns when the guest has it. Raises VshError kinds.

    by: a name of vmkit.shares.transports; "" for the first one that the guest has.

    The share ends with the machine, when the guest unmounts it, or by end_share().
    """
    check_folder(place)
    for share in read_shares(machine):
        if share.guest == place.guest:
            raise MachineError(
                f"{machine} has {share.host} at {share.guest} already",
                hint=f"choose another place, or end that share: vmkit unshare {machine} {shlex.quote(share.guest)}",
            )
    facts = {"host": str(place.host), "guest": place.guest, "read_only": place.read_only}
    return parse_share(start_and_ask("vmkit.shares.daemon", "share", {"machine": machine, "by": by, **facts}))


@contextlib.contextmanager
def open_share(machine: str, place: SharedPlace, by: str = "") -> Iterator[LiveShare]:
    """Shares a folder for as long as the block lasts."""
    share = start_share(machine, place, by)
    try:
        yield share
    finally:
        end_share(share)


def end_share(share: LiveShare) -> None:
    """Ends a share: who uses it in the guest gets an error. Raises MachineError when its process does not end."""
    if not end_by_entry(share.pid, lambda: share in read_shares()):
        raise MachineError(f"the process {share.pid} of share {share.number} does not end")
