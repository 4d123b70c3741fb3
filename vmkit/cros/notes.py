"""What the process that serves a guest tells the monitor: records as of a guest's log (vshd.carry.records). Pure."""

from vmkit.cros.messages import SEVERITY_OF_EMERGENCY, SentRecord
from vshd.carry.records import IS_CUT, TEXT_MAX, LogRecord

# ChromeOS's ports. Its maitred reports VmReady at 7777, where vmkit's READY comes in: maitred.listen_port=7776 on the
# guest's kernel command line makes it report here.
LOGS_PORT, READY_PORT = 9999, 7776
PORTS = (LOGS_PORT, READY_PORT)
# A note's kind, in the place of a record's source. LINE: a line of a log, as a program writes one to /dev/log.
# VM_READY: the guest's maitred has reported. DROPPED: the number says how many lines were too many.
LINE, VM_READY, DROPPED = range(3)

_LEVELS = 8
_NOTICE = 5
# The facility of a program's line.
_USER = 1 << 3
_SECONDS_MAX = 1 << 33
NS = 1_000_000_000


def make_line(record: SentRecord, now_ns: int) -> LogRecord:
    """The note of a record. now_ns: for one without a time that can be."""
    level = record.severity - SEVERITY_OF_EMERGENCY
    if not 0 <= level < _LEVELS:
        level = _NOTICE
    text = b"<%d>" % (_USER | level) + record.content.lstrip(b" ")
    flags = IS_CUT if len(text) > TEXT_MAX else 0
    time = record.timestamp
    is_time = time is not None and 0 < time.seconds < _SECONDS_MAX and 0 <= time.nanos < NS
    time_ns = time.seconds * NS + time.nanos if time is not None and is_time else now_ns
    return LogRecord(LINE, 0, text[:TEXT_MAX], flags=flags, time_ns=time_ns)
