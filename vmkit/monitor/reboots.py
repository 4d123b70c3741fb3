"""Which ends of a guest are reboots, after which its machine goes on with another boot, and when there are too many.

A guest asks for a reset. QEMU ends then, and the monitor starts another one with the same plan: the machine keeps its
name, its CID, its token and its disk. Knows no QEMU.
"""

import time
from collections.abc import Callable

from vmkit.monitor.end import End

RESET = "reset"
# A guest that resets itself in each boot takes a processor, and is of no use. A test may reboot a few times in a row.
MAX_SHORT_BOOTS = 10
SHORT_BOOT_S = 60.0


class Reboots:
    """The reboots of one machine. Invariant: at most MAX_SHORT_BOOTS boots in a row were short.

    is_wanted: whether a reset is a reboot; without that it is the end of the machine. count: the reboots until now.
    """

    def __init__(self, *, is_wanted: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_wanted = is_wanted
        self.count = 0
        self._clock = clock
        self._short_boots = 0
        self._ready_s: float | None = None

    def note_ready(self) -> None:
        """The guest has sent READY."""
        self._ready_s = self._clock()

    def take(self, end: End, *, is_asked: bool) -> End | None:
        """How the machine ends, or None: it boots again, and the reboot is counted.

        end: that of the guest's boot. is_asked: the host has asked the machine to end.
        """
        if not self.is_wanted or end.reason != RESET or is_asked:
            return end
        is_short = self._ready_s is None or self._clock() - self._ready_s < SHORT_BOOT_S
        self._ready_s = None
        self._short_boots = self._short_boots + 1 if is_short else 0
        if self._short_boots > MAX_SHORT_BOOTS:
            return End(
                "reset-loop",
                f"the guest reboots again and again: {self._short_boots} boots in a row ended with a reset "
                f"before they had run for {SHORT_BOOT_S:g} s",
                hint="its console tells why: vmkit logs; without --on-reset=restart a reset ends the machine",
            )
        self.count += 1
        return None
