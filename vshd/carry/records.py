"""The records of a guest's log on their way to the host, as bytes (docs/reference/protocol.md 8). No I/O.

Both ends know this format. What a record says is the host's to read: the guest parses no line of its programs.
"""

import struct

# Where a record comes from. BEGIN and MARK are words of the collector about the stream itself, and no records. FIELDS
# is of the journal as well: its text is the priority, the unit, the name, the process id that the writer claims, each
# with a NUL behind it, and the message.
BEGIN, SYSLOG, KERNEL, COLLECTOR, JOURNAL, MARK, FIELDS = range(7)
# Flags: the text was longer; the writer's ids are the kernel's word.
IS_CUT, HAS_WRITER = 1, 2
# Length of the text, source, flags, 0, number, time in nanoseconds since 1970, pid, uid, gid.
HEADER = struct.Struct("<IBBHQQIII")
# A record of /dev/kmsg has at most so many bytes (CONSOLE_EXT_LOG_MAX, kernel/printk/internal.h). A line of a program
# that is longer is cut.
TEXT_MAX = 8192
ID_SIZE = 16
# What the host sends: a number, and the collector answers with a MARK of that number.
WORD_SIZE = 8
NUMBER_MAX = (1 << 64) - 1

encode_header = HEADER.pack


class RecordError(ValueError):
    """The bytes are no records."""


class LogRecord:
    """One record, or one word of the collector.

    number: of the record, without a gap as long as none is lost. Of BEGIN, the number that is next; of MARK, the host's
    word. time_ns: the guest's, since 1970. pid, uid and gid: of the process that wrote it, with HAS_WRITER in flags.
    """

    __slots__ = ("flags", "gid", "number", "pid", "source", "text", "time_ns", "uid")

    def __init__(
        self,
        source: int,
        number: int,
        text: bytes,
        *,
        flags: int = 0,
        time_ns: int = 0,
        pid: int = 0,
        uid: int = 0,
        gid: int = 0,
    ) -> None:
        self.source = source
        self.number = number
        self.text = text
        self.flags = flags
        self.time_ns = time_ns
        self.pid = pid
        self.uid = uid
        self.gid = gid

    def encode(self) -> bytes:
        """The record as bytes."""
        head = HEADER.pack(
            len(self.text), self.source, self.flags, 0, self.number, self.time_ns, self.pid, self.uid, self.gid
        )
        return head + self.text


class LogReader:
    """Finds the records in a stream of bytes. Invariant: `_held` is the beginning of one record, and no more."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> list[LogRecord]:
        """The records that are whole now. Raises RecordError for what is no such stream."""
        data = self._held + data
        records = []
        start, size = 0, HEADER.size
        while len(data) - start >= size:
            length, source, flags, _, number, time_ns, pid, uid, gid = HEADER.unpack_from(data, start)
            if length > TEXT_MAX:
                raise RecordError(f"a record of {length} bytes, more than {TEXT_MAX}")
            end = start + size + length
            if end > len(data):
                break
            text = data[start + size : end]
            records.append(LogRecord(source, number, text, flags=flags, time_ns=time_ns, pid=pid, uid=uid, gid=gid))
            start = end
        self._held = data[start:]
        return records
