"""The classes that Google's protobuf makes of vm_host.proto: an independent codec to compare ours with."""

from typing import Any

from tests.vmkit.maitred.google import make_classes, read_proto
from tests.vsh.live import CHECKOUT

FILE, METHODS = read_proto(CHECKOUT / "vmkit/cros/proto/vm_host.proto")
CLASSES = make_classes(FILE)


def make_request(*records: dict[str, Any]) -> Any:
    """A LogRequest: of each record its fields, with `time` in nanoseconds."""
    request = CLASSES["LogRequest"]()
    for fields in records:
        record = request.records.add(**{name: value for name, value in fields.items() if name != "time"})
        if "time" in fields:
            record.timestamp.seconds, record.timestamp.nanos = divmod(fields["time"], 10**9)
    return request
