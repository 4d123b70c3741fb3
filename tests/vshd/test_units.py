"""The services that failed, as systemd's private bus tells of them: from its bytes to the frames for the host."""

import base64
import contextlib
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vshd.private_bus import UNIT_PATH, PrivateBus, make_change, make_properties, make_signal
from tests.vshd.service_thread import serve_in_thread
from vshd.flags import Options
from vshd.services import failures
from vshd.services import units as module
from vshd.services.failures import UnitWatch, unescape
from vshd.services.table import Surroundings
from vshd.services.units import UnitService, find_init, open_service
from vshd.session.refusal import RefusalError
from vshd.wire import messages, units
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.requests import Units
from vshd.wire.units import UnitFacts, UnitReader, encode

LET_IN = b"OK 73816218347d4d13b92031ba929b65e3\r\n"
# What systemd 257 sent at the end of `systemd-run --unit=x sh -c "exit 3"`.
CAPTURED = zlib.decompress(
    base64.b64decode(
        "eNrtVt1OE0EUnqVVfiw/BSREBTTegIk0+gb8VIWIIRSIV+rSnZaVMkN2ZpuiMd6gj2AiTyBGE69IJF4Qb732zjdQY+IL6Jmdne20"
        "7NaSKBHdSSbtnPOdM2fOnjnzlZKGcTGJUBdCaBemYVB0CX4z1ClmCg7GFmZrnG5k2CbjeN26knGJzTOVu1cxw07ZzmPkjRaDoRH4"
        "BbNxzWx8etJl4/MO3cAOtzFDCcClAVcVTa2apIgt6Qa1gn4wxI/a3oehNqOI2pj5kJUfmQzW5xvYjOeqkX5pkfYpmLcotwubE/k8"
        "ZgzBvpAGRCjxcK0w50ybzM9MI8NFaMWQdh0wpyjhDi0pVSDPcZO7bBFXuPBWO04F+qzjEIoMW8q7Avmkp6JOrW1voF82nZJN1kIw"
        "YpyEuYCZW/L3FvEzVx5NnXcBl6hpVVE6RsQ3VcIm0Zzo+m74f9Mu4znqEh6BESMBc8lPzA8YYn1dW7eLvIM9Nx3OqulDAzCzFZwX"
        "Oc8J5aK9LlDrG8jgoHt1Z6f41Dzp1Vg4bo4Syimx857B+4/LoszQaQ2frdj1boMxHIWrdRuMQQ1/wyQWLRRCXV9ogItwHdSLstNr"
        "MKXJp6iFVSF11eYF6iUoMbhzCHX6eqhdy+Y2JbDurpdlK4F/L7fzDtZ9KxnAULsu0+L11gDorLGhjGv7BTLAdfgyWZvV88m12Anu"
        "emBHN9RdU2uBSGlrfystZikDXAla3ZuEDOM4t7qhRq1uCUIG/WpCfpKJPIdLKwoCe9dVtAnTk8m0XQMfD7ATAMR1dlxCbFL00p5z"
        "V0J1YvT7rQnLYx0o/8/fX3pXdigCV1/+xv3bwZWdITLKsCur/A5H4eocK7/9QT6yhGOnYbxhuKh4+6r4Bg0GoXPhuMguMKCfLzRi"
        "OUYiceGuRUuepSsoOerSMV8mXreM/79bPnGyJahWvyIx6imZYHAleFVp+E9VYBcS66fOF15+z4biDsb6bWspreKR+9U57ZL+Bg/q"
        "a5z1PpF+Ul6eyjRvio2hp7aYm0LeA/PZh+yZ1wOz754nE/vWvbc7Qp5W38vDT2Nu2iWGTpijjI3Vf9cO/Uz+syhjYl7fERSrJ6ZY"
        "McWKKdZvo1hb27tevIelWF/TVjqmWH+UYqVjihVTrJhixRTriClWX0yxGlIshI4XxRJPIIabfDkv3uGYYkVRrOTMXtCvm6FYg/vF"
        "9N9GsYwGFCsRU6x6itX/n1OsAjwV2Do8xdJtm6FYq9t7h6JYj9Or/yTFUnlolmKpPPyKYim/zVIs5TemWEdLsX4CV1ceBQ=="
    )
)


def make_watch(*, is_open: bool = True) -> UnitWatch:
    watch = UnitWatch()
    watch.begin(0)
    if is_open:
        assert watch.receive(LET_IN) == []
    return watch


def read(facts: UnitFacts) -> tuple[object, ...]:
    return facts.unit, facts.result, facts.code, facts.status, facts.pid


def test_what_systemd_sent_is_one_failure() -> None:
    for size in (1, 7, 1000, len(CAPTURED)):
        watch = make_watch()
        found = [facts for at in range(0, len(CAPTURED), size) for facts in watch.receive(CAPTURED[at : at + size])]
        (facts,) = found
        assert read(facts) == (b"x.service", b"exit-code", units.EXITED, 3, 354)
        assert facts.invocation.hex() == "96cb451aad164abc990403c06460b9a9"
        assert (facts.time_s, facts.restarts, facts.is_restarted) == (1796079754, 0, False)


def test_nothing_is_called_before_systemd_lets_us_in() -> None:
    watch = make_watch(is_open=False)
    assert watch.take_outgoing() == b"\0AUTH EXTERNAL 30\r\n"
    assert not watch.is_open
    watch.receive(LET_IN[:-1])
    assert watch.take_outgoing() == b""
    watch.receive(LET_IN[-1:])
    assert watch.is_open
    out = watch.take_outgoing()
    assert out.startswith(b"BEGIN\r\n")
    assert b"Subscribe" in out
    assert b"ListUnitsByPatterns" in out
    with pytest.raises(RemoteProtocolError, match="authentication failed: REJECTED"):
        make_watch(is_open=False).receive(b"REJECTED EXTERNAL\r\n")


@pytest.mark.parametrize(
    "change",
    [
        make_change(Result=("s", b"success")),
        make_change(ActiveState=("s", b"active"), SubState=("s", b"running")),
        make_change(ActiveState=("s", b"activating"), SubState=("s", b"start"), StatusText=("s", b"it failed")),
        # Another unit than a service, and half of a change.
        make_change().replace(b"_2eservice", b"_2eserviced"),
        make_change("a")[: len(make_change("a")) // 2] + make_change("b")[len(make_change("b")) // 2 :],
        make_signal(UNIT_PATH + "web_2eservice", "PropertiesChanged", "s", b"org.freedesktop.systemd1.Unit failed"),
        make_signal("/web_2eservice", "Other", ""),
    ],
)
def test_what_is_no_failure_is_none(change: bytes) -> None:
    watch = make_watch()
    with contextlib.suppress(RemoteProtocolError):
        assert watch.receive(change) == []


def test_service_that_is_started_again_fails_each_time() -> None:
    watch = make_watch()
    again: dict[str, tuple[str, object]] = {"ActiveState": ("s", b"activating"), "SubState": ("s", b"auto-restart")}
    for number in (1, 2, 3):
        (facts,) = watch.receive(make_change("web", number, **again) * 2)
        assert (facts.pid, facts.restarts, facts.is_restarted) == (100 + number, number - 1, True)
    # systemd gives up, with the same facts, and then with a word of its own.
    assert watch.receive(make_change(number=3)) == []
    (facts,) = watch.receive(make_change(number=3, Result=("s", b"start-limit-hit")))
    assert (facts.result, facts.is_restarted) == (b"start-limit-hit", False)


def test_main_process_of_an_earlier_run_is_not_named() -> None:
    watch = make_watch()
    assert [facts.pid for facts in watch.receive(make_change())] == [101]
    (facts,) = watch.receive(make_change(InvocationID=("ay", b"\2" * 16)))
    assert (facts.code, facts.status, facts.pid) == (units.NO_END, 0, 0)


def test_memory_of_failures_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "TOLD_MAX", 2)
    watch = make_watch()
    for name in ("a", "b", "c"):
        assert len(watch.receive(make_change(name))) == 1
    assert watch.receive(make_change("c")) == []
    assert len(watch.receive(make_change("a"))) == 1


def test_name_of_a_unit_is_read_from_its_path() -> None:
    assert unescape(b"web_40one_2eservice") == b"web@one.service"
    assert unescape(b"a_b_zz_2") == b"a\xb0_zz_2".replace(b"\xb0", b"_b")


class Host:
    """The test's end of a running service."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.end = ""
        self._reader = UnitReader()
        self._found: list[UnitFacts | int] = []

    def receive(self) -> UnitFacts | int:
        while not self._found:
            data = self.client.recv(1 << 16)
            assert data, self.end
            self._found += self._reader.feed(data)
        return self._found.pop(0)

    def receive_facts(self) -> UnitFacts:
        facts = self.receive()
        assert isinstance(facts, UnitFacts)
        return facts


@contextlib.contextmanager
def serving(path: Path, uid: int | None = None) -> Iterator[Host]:
    ours, theirs = socket.socketpair()
    host = Host(ours)
    with serve_in_thread(lambda: UnitService(None, str(path), uid), host, theirs, b""):
        yield host


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PrivateBus]:
    bus = PrivateBus(tmp_path / "private")
    yield bus
    bus.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(module, "RETRY_MAX_S", 0.05)


def test_failures_come_as_they_happen_and_those_before_as_well(bus: PrivateBus) -> None:
    bus.failed = {"early": make_properties(7)}
    with nothing_left_open(), serving(bus.path) as host:
        bus.accept()
        bus.serve()
        assert read(host.receive_facts()) == (b"early.service", b"exit-code", units.EXITED, 3, 107)
        for size in (3, 1 << 16):
            change = make_change(f"web{size}", ExecMainCode=("i", 2), ExecMainStatus=("i", 9), Result=("s", b"signal"))
            for at in range(0, len(change), size):
                bus.send(change[at : at + size])
            facts = host.receive_facts()
            assert read(facts) == (f"web{size}.service".encode(), b"signal", units.KILLED, 9, 101)
            assert (facts.invocation, facts.time_s) == (b"\1" * 16, 1_700_000_001)
        bus.drop()
    assert host.end == "ended: the host has left"


def test_systemd_that_comes_late_or_executes_itself_anew_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "private"
    with serving(path) as host:
        with contextlib.closing(PrivateBus(path)) as bus:
            bus.accept()
            bus.serve()
            bus.send(make_change("one"))
            assert host.receive_facts().unit == b"one.service"
        with contextlib.closing(PrivateBus(path)) as bus:
            # What the host has is not sent again.
            bus.failed = {"one": make_properties(), "two": make_properties()}
            bus.accept()
            bus.serve()
            assert host.receive_facts().unit == b"two.service"


@pytest.mark.parametrize(
    "bad", [b"\xff" * 16, make_change()[:2] + b"\0\1" + bytes(4) + b"\1" * 8, LET_IN * 20], ids=["no", "huge", "more"]
)
def test_bus_that_sends_nonsense_is_left_and_tried_again(bus: PrivateBus, bad: bytes) -> None:
    with serving(bus.path) as host:
        bus.accept(b"REJECTED\r\n")
        bus.accept(b"x" * 1000)
        bus.accept()
        bus.send(bad)
        bus.accept()
        bus.serve()
        bus.send(make_change())
        assert host.receive_facts().unit == b"web.service"


def test_restart_loop_has_a_limit_which_leaves_room_for_others(bus: PrivateBus) -> None:
    with serving(bus.path) as host:
        bus.accept()
        bus.serve()
        for number in range(1, 31):
            bus.send(make_change("loop", number))
        bus.send(make_change("other"))
        units_seen, lost = [], 0
        while b"other.service" not in units_seen or lost == 0:
            value = host.receive()
            if isinstance(value, int):
                lost += value
            else:
                units_seen.append(value.unit)
        assert units_seen == [b"loop.service"] * module.UNIT_BURST + [b"other.service"]
        assert 0 < lost <= 30 - module.UNIT_BURST


def test_guest_without_systemd_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "exe"
    link.symlink_to("/usr/lib/systemd/systemd")
    assert find_init(str(link)) == "systemd"
    assert find_init(str(tmp_path / "none")) == ""
    surroundings = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)
    if find_init() != "systemd":
        with pytest.raises(RefusalError, match="this guest has no systemd: its pid 1 is ") as caught:
            open_service(Units(), -1, surroundings)
        assert caught.value.failure.kind == messages.NOT_FOUND
    # pid 1 is about to become it.
    surroundings.facts = b"WALL=on\nINIT=systemd\n"
    assert isinstance(open_service(Units(), -1, surroundings), UnitService)


def test_socket_of_another_user_is_no_systemd(bus: PrivateBus) -> None:
    with serving(bus.path, os.geteuid() + 1):
        for _ in range(2):
            # Each connection is closed, unread.
            assert bus.meet() == b""


def test_frames_come_apart_as_they_were_put_together() -> None:
    facts = UnitFacts()
    facts.unit, facts.result, facts.invocation = b"web.service", b"timeout", b"i" * 16
    facts.code, facts.status, facts.pid, facts.time_s, facts.restarts = units.KILLED, 9, 7, 1_700_000_000, 4
    facts.is_restarted = True
    data = encode(units.FAILED, facts.encode()) + encode(units.LOST, b"\5\0\0\0")
    for size in (1, 5, len(data)):
        reader = UnitReader()
        found = [value for at in range(0, len(data), size) for value in reader.feed(data[at : at + size])]
        assert [value if isinstance(value, int) else value.encode() for value in found] == [facts.encode(), 5]
    with pytest.raises(RemoteProtocolError, match="of kind 3 with 0 bytes"):
        list(UnitReader().feed(encode(3, b"")))
    with pytest.raises(RemoteProtocolError, match="of kind 1 with 4097 bytes"):
        list(UnitReader().feed(encode(units.FAILED, bytes(4097))))


def test_host_that_leaves_ends_the_service_without_systemd_too(tmp_path: Path) -> None:
    with nothing_left_open(), serving(tmp_path / "none") as host:
        pass
    assert host.end == "ended: the host has left"
