"""Reads the kernel's log of a guest: by the kernel's note, else by the log's first line. Pure.

It needs nothing of the guest, so the guest may run, be paused, hang, or be gone. It believes nothing: whatever a guest
has in its memory, the answer is a list of records or a MachineError, after a bounded amount of reading.
"""

from collections.abc import Iterator

from vmkit.errors import MachineError
from vmkit.memory.banner import find_release, find_rings
from vmkit.memory.guest import LimitedMemory, Memory, SpentError, UnreadableError
from vmkit.memory.paging import open_space
from vmkit.memory.ring import PrintkRecord, RecordLayout, find_place, read_layout, read_records
from vmkit.memory.vmcoreinfo import CoreInfo, find_core_infos

OLDEST = "5.10"


def read_kernel_log(memory: Memory) -> list[PrintkRecord]:
    """The records in a guest's memory, the oldest first; at least one. Raises MachineError."""
    try:
        return _read_any(LimitedMemory(memory))
    except SpentError as error:
        raise MachineError(
            "the guest's memory is made to keep its reader busy",
            hint="a program in the guest has forged a kernel's log",
        ) from error


def _read_any(memory: Memory) -> list[PrintkRecord]:
    reasons: list[str] = []
    for info in find_core_infos(memory):
        try:
            if records := _read_by_note(memory, info):
                return records
        except UnreadableError as error:
            reasons.append(str(error))
    # A kernel that has copied its log to a larger ring leaves the old one, with fewer records.
    found = max(_read_by_banner(memory), key=len, default=[])
    if not found:
        raise _explain(find_release(memory), reasons)
    return found


def _read_by_note(memory: Memory, info: CoreInfo) -> list[PrintkRecord]:
    layout, space = read_layout(info), open_space(memory, info)
    return read_records(space, find_place(space, info), layout)


def _read_by_banner(memory: Memory) -> Iterator[list[PrintkRecord]]:
    layout = RecordLayout()
    for space, place in find_rings(memory):
        try:
            yield read_records(space, place, layout)
        except UnreadableError:
            continue


def _explain(release: str, reasons: list[str]) -> MachineError:
    if not release:
        return MachineError("the guest's memory holds no Linux kernel", hint="it may not have been unpacked yet")
    why = f": {reasons[0]}" if reasons else ""
    return MachineError(
        f"the guest's kernel {release} has no log that vmkit can read{why}",
        hint=f"vmkit reads Linux {OLDEST} and later; a kernel that has just started has no log yet",
    )
