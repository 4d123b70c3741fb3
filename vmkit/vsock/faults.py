"""The faults that users asked for: which are active, how often each was met, and when one is used up. Pure."""

from typing import Final

from vmkit.vsock.requests import Fault, RequestError

MAX_FAULTS: Final = 32


class FaultTable:
    """The active faults, by number. A number is never used again, so that a late `clear` hits no other fault."""

    def __init__(self) -> None:
        self._active: dict[int, Fault] = {}
        self._next_number = 1

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, fault: Fault) -> Fault:
        """Takes a fault in; returns it with its number. Raises RequestError when there are too many."""
        if len(self._active) >= MAX_FAULTS:
            raise RequestError(f"{MAX_FAULTS} faults are active; clear some first")
        fault = fault._replace(number=self._next_number, hits=0)
        self._next_number += 1
        self._active[fault.number] = fault
        return fault

    def remove(self, number: int) -> list[int]:
        """Ends a fault, or all when the number is 0; returns the numbers of those that ended."""
        ended = list(self._active) if number == 0 else [number] if number in self._active else []
        for one in ended:
            del self._active[one]
        return ended

    def hit(self, number: int) -> bool:
        """Counts a connection that the fault has met; True when it was the fault's last."""
        fault = self._active.get(number)
        if fault is None:
            return False
        fault = self._active[number] = fault._replace(hits=fault.hits + 1)
        if not fault.times or fault.hits < fault.times:
            return False
        del self._active[number]
        return True

    def get(self, number: int) -> Fault | None:
        """The active fault of this number."""
        return self._active.get(number)

    def find(self, host_port: int, guest_port: int) -> list[Fault]:
        """The faults for a connection of these ports, oldest first."""
        return [fault for fault in self._active.values() if fault.matches_ports(host_port, guest_port)]

    def all(self) -> list[Fault]:
        """All active faults, oldest first."""
        return list(self._active.values())
