"""Finds the services that failed in what systemd's private bus sends. No I/O.

systemd sends the changed properties of each unit, for a service first those of services and then those of all units.
Both together are the facts of a failure, so a unit that is gone at once is not asked for anything. Most changes are no
failures, and are not read. After the connection has come, systemd is asked once for what has failed before.
"""

from vshd.wire import dbus, units
from vshd.wire.dbus import BusClient
from vshd.wire.units import UnitFacts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.wire.dbus import BusMessage, Value

MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
PROPERTIES = "org.freedesktop.DBus.Properties"
UNIT, SERVICE = b"org.freedesktop.systemd1.Unit", b"org.freedesktop.systemd1.Service"
UNIT_PREFIX = b"/org/freedesktop/systemd1/unit/"
# A path has letters and digits alone, and `_` with two digits for each other byte.
SERVICE_SUFFIX = b"_2eservice"
SUCCESS = b"success"
# Of services that have failed before.
LISTED_MAX = 16
# A guest has some hundred services. A failure that is forgotten may be told again.
TOLD_MAX = 1024
# Words of the states of which one is a failure's.
FAILED, AGAIN = b"failed", b"auto-restart"
MICROSECONDS = 1_000_000


class UnitWatch:
    """One connection after the other to systemd.

    `_service` is the last change that came of a service: that of the unit follows. `_asked` has the calls for a unit's
    properties, and `_answer` the first answer of the two. `_told` has the last failure of each service that the caller
    has, at most TOLD_MAX.
    """

    def __init__(self) -> None:
        self._client = BusClient(0)
        self._service: BusMessage | None = None
        self._asked: dict[int, bytes] = {}
        self._answer: tuple[bytes, BusMessage] | None = None
        self._list = 0
        self._told: dict[bytes, tuple[Value, ...]] = {}

    def begin(self, uid: int) -> None:
        """A new connection, of this user."""
        self._client = BusClient(uid, SERVICE_SUFFIX)
        self._service = self._answer = None
        self._asked = {}
        self._client.call(MANAGER_PATH, MANAGER, "Subscribe")
        self._list = self._client.call(MANAGER_PATH, MANAGER, "ListUnitsByPatterns", [FAILED], [b"*.service"])

    @property
    def is_open(self) -> bool:
        """Whether systemd has let us in."""
        return self._client.is_open

    def take_outgoing(self) -> bytes:
        """What is to be sent."""
        data, self._client.outgoing = self._client.outgoing, b""
        return data

    def receive(self, data: bytes) -> list[UnitFacts]:
        """The failures that these bytes tell of. Raises RemoteProtocolError."""
        found = []
        for message in self._client.receive(data):
            facts = None
            if message.kind == dbus.SIGNAL:
                facts = self._take_signal(message)
            elif message.reply_to == self._list:
                self._take_list(message)
            elif message.reply_to in self._asked:
                facts = self._take_answer(message, self._asked.pop(message.reply_to))
            if facts is not None:
                found.append(facts)
        return found

    def _take_signal(self, message: "BusMessage") -> UnitFacts | None:
        if message.member != b"PropertiesChanged" or not _is_service(message.path):
            return None
        if message.begins_with(SERVICE):
            self._service = message
            return None
        before, self._service = self._service, None
        if before is None or before.path != message.path or not (message.mentions(FAILED) or message.mentions(AGAIN)):
            return None
        return self._find_failure(message.path, *_read_change(before), *_read_change(message))

    def _take_list(self, message: "BusMessage") -> None:
        self._list = 0
        (rows, *_) = [*message.read(), None] if message.kind == dbus.RETURN else [None]
        for row in rows[:LISTED_MAX] if isinstance(rows, list) else []:
            path = row[6] if isinstance(row, tuple) and len(row) > 6 else None
            if isinstance(path, bytes) and _is_service(path):
                for interface in (SERVICE, UNIT):
                    call = self._client.call(path.decode("ascii", "replace"), PROPERTIES, "GetAll", interface)
                    self._asked[call] = path

    def _take_answer(self, message: "BusMessage", path: bytes) -> UnitFacts | None:
        before, self._answer = self._answer, None
        # A unit that is gone by now has no properties.
        if message.kind != dbus.RETURN:
            return None
        if before is None or before[0] != path:
            self._answer = (path, message)
            return None
        return self._find_failure(path, *before[1].read()[:1], *message.read()[:1])

    def _find_failure(self, path: bytes, *properties: "Value") -> UnitFacts | None:
        """The failure that the properties tell of, unless the caller has it. properties: the service's, the unit's."""
        known: dict[bytes, Value] = {}
        for some in properties:
            if isinstance(some, dict):
                known.update(some)
        if not is_failed(known):
            return None
        facts = make_facts(path, known)
        main = (known.get(b"ExecMainPID"), known.get(b"ExecMainExitTimestamp"))
        told = self._told.pop(path, ())
        if told and told[0] != facts.invocation and told[2:] == main:
            # It failed before its main process was started: these facts are of the run before.
            facts.code, facts.status, facts.pid = units.NO_END, 0, 0
        is_known = told[:2] == (facts.invocation, facts.result)
        self._told[path] = (facts.invocation, facts.result, *main)
        if len(self._told) > TOLD_MAX:
            del self._told[next(iter(self._told))]
        return None if is_known else facts


def is_failed(known: "dict[bytes, Value]") -> bool:
    """Whether a service has just failed. One that is to be started again is for a moment in a state of its own."""
    sub = known.get(b"SubState")
    is_over = known.get(b"ActiveState") == b"failed" or (isinstance(sub, bytes) and sub.startswith(b"auto-restart"))
    return is_over and known.get(b"Result", SUCCESS) not in (SUCCESS, b"")


def make_facts(path: bytes, known: "dict[bytes, Value]") -> UnitFacts:
    """The facts of a service that failed."""
    facts = UnitFacts()
    facts.unit = unescape(path.removeprefix(UNIT_PREFIX))[: units.NAME_MAX]
    facts.result = _find_bytes(known, b"Result")[: units.RESULT_MAX]
    facts.code = _find_number(known, b"ExecMainCode")
    facts.status = _find_number(known, b"ExecMainStatus")
    facts.pid = _find_number(known, b"ExecMainPID")
    facts.invocation = _find_bytes(known, b"InvocationID")[: units.INVOCATION_SIZE]
    facts.time_s = _find_number(known, b"StateChangeTimestamp") // MICROSECONDS
    facts.restarts = _find_number(known, b"NRestarts")
    facts.is_restarted = known.get(b"ActiveState") != b"failed"
    return facts


def unescape(label: bytes) -> bytes:
    """The name that a part of a path stands for."""
    first, *others = label.split(b"_")
    name = first
    for other in others:
        try:
            name += bytes.fromhex(other[:2].decode("ascii", "replace")) + other[2:]
        except ValueError:
            name += b"_" + other
    return name


def _is_service(path: bytes) -> bool:
    return path.startswith(UNIT_PREFIX) and path.endswith(SERVICE_SUFFIX)


def _read_change(message: "BusMessage") -> "list[Value]":
    """The properties of a change, behind their interface. Raises RemoteProtocolError."""
    return message.read()[1:2]


def _find_bytes(known: "dict[bytes, Value]", key: bytes) -> bytes:
    value = known.get(key)
    return value if isinstance(value, bytes) else b""


def _find_number(known: "dict[bytes, Value]", key: bytes) -> int:
    value = known.get(key)
    return value if isinstance(value, int) and value >= 0 else 0
