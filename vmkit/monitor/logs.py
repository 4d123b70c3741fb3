"""A machine's logs: files with a ceiling, and the event log with times.

A guest can print for ever, so every file rolls over into NAME.1 at its ceiling: the newest bytes are kept, never more
than twice the ceiling.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

LOG_CEILING_BYTES = 4 * 1024 * 1024
OLDER_SUFFIX = ".1"


class CappedLog:
    """Appends bytes to a file that never grows past its ceiling; the generation before is kept beside it as NAME.1.

    Writing never fails: what cannot be written (a full disk, a folder that is gone) is lost, and nothing else.
    """

    def __init__(self, path: Path, ceiling_bytes: int = LOG_CEILING_BYTES) -> None:
        self.path = path
        self._ceiling_bytes = ceiling_bytes
        self._file: FileIO | None = path.open("ab", buffering=0)
        self._size_bytes = self._file.tell()

    def write(self, data: bytes) -> None:
        """Appends; rolls over first when the ceiling is near."""
        if self._file is None:
            return
        data = data[-self._ceiling_bytes :]
        if self._size_bytes + len(data) > self._ceiling_bytes:
            self._roll()
        with contextlib.suppress(OSError):
            self._size_bytes += self._file.write(data) or 0

    def close(self) -> None:
        """Later writes are lost."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _roll(self) -> None:
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_name(self.path.name + OLDER_SUFFIX))
        # Where the older one cannot be kept, the ceiling still holds.
        with contextlib.suppress(OSError):
            file = self.path.open("wb", buffering=0)
            self.close()
            self._file, self._size_bytes = file, 0


class EventLog:
    """What happened to a machine and when: one JSON object a line, `t` in seconds since the epoch, `up` since the
    start.
    """

    def __init__(self, path: Path) -> None:
        self._log = CappedLog(path)
        self._start_s = time.monotonic()

    def add(self, event: str, data: Mapping[str, object] | None = None) -> dict[str, object]:
        """Writes one event and returns it."""
        record: dict[str, object] = {
            "t": round(time.time(), 3),
            "up": round(time.monotonic() - self._start_s, 3),
            "event": event,
            **(data or {}),
        }
        self._log.write(json.dumps(record).encode() + b"\n")
        return record

    def close(self) -> None:
        """Later events are lost."""
        self._log.close()
