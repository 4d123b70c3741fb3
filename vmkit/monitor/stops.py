"""A guest that QEMU has stopped without being asked: a disk that took no write, or an internal error of QEMU.

QEMU repeats the write when the guest runs again. So a full disk of this host costs the guest time, and nothing else.
"""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmkit.errors import VmkitError
from vmkit.monitor.end import End
from vmkit.monitor.life import Life
from vmkit.monitor.logs import EventLog
from vmkit.monitor.pausing import Pausing

if TYPE_CHECKING:
    from vmkit.monitor.child import Child
    from vmkit.monitor.qmp import Qmp

FILE_ERROR = "BLOCK_IO_ERROR"
MAX_REASON_CHARACTERS = 200
_CANNOT_WRITE = "this host cannot write what the guest writes"


class Stops:
    """What QEMU said of the last disk that failed, and what becomes of a guest that stopped."""

    def __init__(self, life: Life, pausing: Pausing, events: EventLog) -> None:
        self._life = life
        self._pausing = pausing
        self._events = events
        self._why = ""

    def note(self, name: str, data: Mapping[str, object]) -> None:
        """Takes an event of QEMU."""
        if name == FILE_ERROR:
            reason = str(data.get("reason", "an error of its file"))[:MAX_REASON_CHARACTERS]
            self._why = f"{_CANNOT_WRITE}: {reason}"

    async def look(self, qmp: "Qmp | None", qemu: "Child | None") -> None:
        """Looks why the guest has stopped. One that was asked to, or that is ending, has no reason."""
        state = ""
        if qmp is not None:
            with contextlib.suppress(VmkitError):
                state = await qmp.query_run_state()
        if state == "io-error":
            self._take_file_error()
        elif state == "internal-error" and qemu is not None:
            brief = "QEMU stopped the guest with an internal error"
            hint = "if this is KVM inside another VM, try --accel tcg"
            self._life.finish(End("internal-error", brief, details=qemu.render_tail(), hint=hint))

    def _take_file_error(self) -> None:
        why = self._why or _CANNOT_WRITE
        if not self._life.is_ready:
            hint = "make room where its file is"
            self._life.finish(End("write-error", f"{why}, before the guest was ready", hint=hint))
            return
        self._events.add("write-error", {"why": why})
        # Where that disk is full, too, the record keeps its old state, and Resume works all the same.
        with contextlib.suppress(OSError):
            self._pausing.note_stop(why)
