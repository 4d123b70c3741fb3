"""QMP against a QEMU that is played at the other end of a socketpair: what it says, refuses, and leaves unsaid."""

import asyncio
import gc
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from vmkit.errors import MachineError
from vmkit.machine.parts.part import Fitting, QmpCommand
from vmkit.monitor import qmp as qmp_module
from vmkit.monitor.logs import CappedLog
from vmkit.monitor.qmp import Qmp

DEADLINE_S = 10.0
GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}


class FakeQemu:
    """QEMU's end. answers: what a command is answered with; a list is several messages, None is silence."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.asked: list[tuple[str, object]] = []
        self.fds: list[int] = []
        self.answers: dict[str, object] = {}

    async def say(self, message: object) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def serve(self) -> None:
        """Answers whatever comes until the peer closes."""
        buffer = ""
        while True:
            data, fds = await self._receive()
            self.fds += fds
            if not data:
                return
            buffer += data.decode()
            while buffer.strip():
                try:
                    request, end = json.JSONDecoder().raw_decode(buffer.lstrip())
                except ValueError:
                    break
                buffer = buffer.lstrip()[end:]
                await self._answer(request)

    async def _answer(self, request: dict[str, object]) -> None:
        name = str(request["execute"])
        self.asked.append((name, request.get("arguments")))
        answer = self.answers.get(name, {})
        for message in answer if isinstance(answer, list) else [answer]:
            if message is None:
                continue
            known = {"id": request["id"]} if "id" in request else {}
            if isinstance(message, dict) and "event" in message:
                await self.say(message)
            elif isinstance(message, dict) and "error" in message:
                await self.say({**message, **known})
            else:
                await self.say({"return": message, **known})

    async def _receive(self) -> tuple[bytes, list[int]]:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.sock, ready.set)
        try:
            while True:
                try:
                    data, fds, _, _ = socket.recv_fds(self.sock, 65536, 4)
                except BlockingIOError:
                    ready.clear()
                    await ready.wait()
                else:
                    return data, fds
        finally:
            loop.remove_reader(self.sock)


Scene = Callable[[Qmp, FakeQemu], Awaitable[None]]


def play(folder: Path, scene: Scene, *, greeting: object = GREETING) -> FakeQemu:
    """Connects, and runs a scene while the fake serves."""

    async def main() -> FakeQemu:
        ours, theirs = socket.socketpair()
        qemu = FakeQemu(theirs)
        log = CappedLog(folder / "qmp.log")
        qmp = Qmp("m", log)
        async with asyncio.timeout(DEADLINE_S):
            if greeting is not None:
                await qemu.say(greeting)
            serving = asyncio.create_task(qemu.serve())
            try:
                await qmp.connect(ours)
                await scene(qmp, qemu)
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                theirs.close()
                await qmp.close()
                log.close()
        return qemu

    return asyncio.run(main())


async def nothing(_qmp: Qmp, _qemu: FakeQemu) -> None:
    pass


def test_connection_negotiates(tmp_path: Path) -> None:
    assert play(tmp_path, nothing).asked == [("qmp_capabilities", {})]


@pytest.mark.parametrize("greeting", [b"", b"not QMP at all\n", {"hello": "you"}, {"QMP": {}}, b"\xff\n"])
def test_wrong_or_no_greeting_is_an_error(tmp_path: Path, greeting: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "CONNECT_DEADLINE_S", 0.1)
    with pytest.raises(MachineError, match="QEMU does not answer on its monitor"):
        play(tmp_path, nothing, greeting=greeting)


def test_qemu_that_has_gone_before_its_greeting_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        await Qmp("m", CappedLog(tmp_path / "qmp.log")).connect(ours)

    with pytest.raises(MachineError, match="QEMU does not answer on its monitor"):
        asyncio.run(main())


def test_end_of_qemu_leaves_no_error_that_nothing_has_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio logs such an error when Python collects the session: at any moment, in the midst of other work."""

    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(MachineError, match="did not answer"):
            await qmp.execute("query-status")

    play(tmp_path, scene)
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_command_gives_its_answer(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["query-status"] = {"status": "internal-error", "running": False}
        assert await qmp.execute("query-status") == {"status": "internal-error", "running": False}
        assert await qmp.query_run_state() == "internal-error"
        qemu.answers["query-status"] = []
        assert await qmp.execute("cont", {"a": 1}) == {}

    assert play(tmp_path, scene).asked[-1] == ("cont", {"a": 1})


def test_refused_command_is_told_in_qemus_words(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["device_add"] = {"error": {"class": "GenericError", "desc": "Bus 'x' not found"}}
        with pytest.raises(MachineError, match="QEMU refused 'device_add': Bus 'x' not found"):
            await qmp.execute("device_add", {})
        assert await qmp.execute("cont") == {}

    play(tmp_path, scene)


def test_command_that_is_not_answered_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "COMMAND_DEADLINE_S", 0.05)

    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["cont"] = [None]
        with pytest.raises(MachineError, match="QEMU did not answer 'cont'"):
            await qmp.execute("cont")

    play(tmp_path, scene)


def test_command_to_a_qemu_that_goes_away_is_an_error(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["cont"] = [None]
        asyncio.get_running_loop().call_later(0.02, qemu.sock.shutdown, socket.SHUT_RDWR)
        with pytest.raises(MachineError, match="QEMU did not answer 'cont'"):
            await qmp.execute("cont")
        with pytest.raises(MachineError, match="QEMU did not answer 'cont'"):
            await qmp.execute("cont")

    play(tmp_path, scene)


def test_plugging_passes_the_descriptor_by_name_first(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()

    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        commands = (QmpCommand("chardev-add", {"id": "c"}), QmpCommand("device_add", {"id": "d"}))
        await qmp.plug(Fitting("vsock", plug=commands, fd_name="vsock-fd"), write_fd)

    qemu = play(tmp_path, scene)
    assert qemu.asked[1:] == [
        ("getfd", {"fdname": "vsock-fd"}),
        ("chardev-add", {"id": "c"}),
        ("device_add", {"id": "d"}),
    ]
    os.close(write_fd)
    (passed,) = qemu.fds
    os.write(passed, b"through")
    assert os.read(read_fd, 100) == b"through"
    os.close(passed)
    os.close(read_fd)


def test_descriptor_that_is_closed_is_an_error(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, _qemu: FakeQemu) -> None:
        await qmp.plug(Fitting("vsock"), 999_999)

    with pytest.raises(MachineError, match="cannot pass a descriptor to QEMU"):
        play(tmp_path, scene)


def event(name: str, **data: object) -> dict[str, object]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}


def test_unplugging_what_the_guest_has_ejected_is_done(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["device_del"] = {"error": {"class": "DeviceNotFound", "desc": "Device 'vsock' not found"}}
        await qmp.unplug("vsock0", 5.0)
        qemu.answers["device_del"] = {"error": {"class": "GenericError", "desc": "Bus does not support hotplugging"}}
        with pytest.raises(MachineError, match="does not support hotplugging"):
            await qmp.unplug("vsock0", 5.0)

    play(tmp_path, scene)


def test_unplugging_waits_until_the_guest_has_let_go(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["device_del"] = [
            {},
            event("DEVICE_DELETED", path="/machine/x"),
            event("DEVICE_DELETED", device="another"),
            event("DEVICE_DELETED", device="vsock0"),
        ]
        await qmp.unplug("vsock0", 5.0)

    assert play(tmp_path, scene).asked[-1] == ("device_del", {"id": "vsock0"})


def test_guest_that_does_not_let_go_is_given_up(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, _qemu: FakeQemu) -> None:
        with pytest.raises(TimeoutError):
            await qmp.unplug("vsock0", 0.05)

    play(tmp_path, scene)


def test_events_are_heard_in_order_and_odd_ones_do_no_harm(tmp_path: Path) -> None:
    heard: list[tuple[str, Mapping[str, object]]] = []

    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        listening = asyncio.create_task(qmp.listen(lambda name, data: heard.append((name, data))))
        await asyncio.sleep(0)
        await qemu.say(event("SHUTDOWN", guest=True, reason="guest-reset"))
        await qemu.say({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}})
        for _ in range(1000):
            await qemu.say(event("RTC_CHANGE", offset=1))
        await qemu.say(event("LAST", data=["not", "a", "mapping"]))
        while not heard or heard[-1][0] != "LAST":
            await asyncio.sleep(0)
        listening.cancel()

    play(tmp_path, scene)
    assert heard[0] == ("SHUTDOWN", {"guest": True, "reason": "guest-reset"})
    assert heard[1] == ("STOP", {})
    assert len(heard) == 1003


def test_answer_of_megabytes_is_taken(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["query"] = {"text": "x" * 2_000_000}
        answer = await qmp.execute("query")
        assert isinstance(answer, dict)
        assert len(answer["text"]) == 2_000_000

    play(tmp_path, scene)


def test_wire_is_logged_both_ways(tmp_path: Path) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        await qmp.execute("cont")

    play(tmp_path, scene)
    text = (tmp_path / "qmp.log").read_text()
    assert '"execute": "cont"' in text
    assert "--> " in text
    assert "<-- " in text


def migration(status: str) -> dict[str, object]:
    return {"event": "MIGRATION", "data": {"status": status}, "timestamp": {"seconds": 1, "microseconds": 0}}


@pytest.mark.parametrize(("call", "command"), [("save_state", "migrate"), ("load_state", "migrate-incoming")])
def test_state_goes_through_a_passed_file_without_the_memory(tmp_path: Path, call: str, command: str) -> None:
    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers[command] = [migration("active"), {}, migration("completed")]
        with (tmp_path / "state").open("w+b") as file:
            await getattr(qmp, call)(file.fileno())

    qemu = play(tmp_path, scene)
    wanted = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
    assert qemu.asked[1:] == [
        ("migrate-set-capabilities", {"capabilities": wanted}),
        ("getfd", {"fdname": "state"}),
        (command, {"uri": "fd:state"}),
    ]
    (fd,) = qemu.fds
    assert Path(f"/proc/self/fd/{fd}").readlink() == tmp_path / "state"
    os.close(fd)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{}, migration("failed")], "QEMU refused the state of the machine"),
        ([{"error": {"class": "GenericError", "desc": "blocked by a device"}}], "blocked by a device"),
        ([{}], "did not end 'migrate-incoming' within"),
        ([None], "did not answer"),
    ],
)
def test_state_that_qemu_does_not_take_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[object], said: str
) -> None:
    for name in ("STATE_DEADLINE_S", "COMMAND_DEADLINE_S"):
        monkeypatch.setattr(qmp_module, name, 0.2)

    async def scene(qmp: Qmp, qemu: FakeQemu) -> None:
        qemu.answers["migrate-incoming"] = answers
        with (tmp_path / "state").open("w+b") as file:
            await qmp.load_state(file.fileno())

    with pytest.raises(MachineError, match=said):
        play(tmp_path, scene)
