"""The messages and methods of ChromeOS's host that vmkit serves. proto/vm_host.proto is the same for people. Pure."""

from vmkit.maitred.messages import Timestamp
from vshd.wire.proto3 import BYTES, BYTES_LIST, INT32, MESSAGE, Field, Message

COLLECT_USER_LOGS = "/vm_tools.LogCollector/CollectUserLogs"
COLLECT_KERNEL_LOGS = "/vm_tools.LogCollector/CollectKernelLogs"
VM_READY = "/vm_tools.StartupListener/VmReady"
# LogRecord.severity is a level of syslog and this; 0 is none.
SEVERITY_OF_EMERGENCY = 1


class SentRecord(Message):
    """ChromeOS's LogRecord. severity: of LogSeverity. timestamp: None where the guest sent none. content: the line."""

    __slots__ = ("content", "severity", "timestamp")

    FIELDS = (Field(1, "severity", INT32), Field(2, "timestamp", MESSAGE, Timestamp), Field(5, "content", BYTES))

    def __init__(self, severity: int = 0, timestamp: Timestamp | None = None, content: bytes = b"") -> None:
        self.severity = severity
        self.timestamp = timestamp
        self.content = content


class LogRequest(Message):
    """records: each a SentRecord, encoded."""

    __slots__ = ("records",)

    FIELDS = (Field(1, "records", BYTES_LIST),)

    def __init__(self) -> None:
        self.records: list[bytes] = []

    def read_records(self) -> list[SentRecord]:
        """Raises RemoteProtocolError for what is no record."""
        records = []
        for data in self.records:
            record = SentRecord()
            record.merge(data)
            records.append(record)
        return records
