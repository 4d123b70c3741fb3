"""A machine's logs: files with a ceiling, and the event log with times.

A guest can print for ever, so every file rolls over into NAME.1 at its ceiling: the newest bytes are kept, never more
than twice the ceiling.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

LOG_CEILING_BYTES = 4 * 1024 * 1024


class CappedLog:
    """Appends bytes to a file that never grows past its ceiling; the generation before is kept beside it as NAME.1."""

    def __init__(self, path: Path, ceiling_bytes: int = LOG_CEILING_BYTES) -> None:
        self.path = path
        self._ceiling_bytes = ceiling_bytes
        self._file = path.open("ab", buffering=0)
        self._size_bytes = self._file.tell()

    def write(self, data: bytes) -> None:
        """Appends; a full disk loses log lines and nothing else."""
        if self._size_bytes + len(data) > self._ceiling_bytes:
            self._roll()
        try:
            self._file.write(data)
        except OSError:
            return
        self._size_bytes += len(data)

    def _roll(self) -> None:
        try:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        finally:
            self._file = self.path.open("ab", buffering=0)
            self._size_bytes = 0

    def close(self) -> None:
        self._file.close()


class EventLog:
    """What happened to a machine and when:

    One JSON object a line, `t` in seconds since the epoch, `up` since the start.
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
        self._log.close()
