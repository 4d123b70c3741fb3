"""The monitor's part in what it serves to a guest: a process for the first client, and lines in the log."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from grpclib.client import Channel, UnaryUnaryMethod

from tests.docs.schemas import check_form
from tests.vmkit.cros.google import CLASSES, make_request
from tests.vsh.live import DEADLINE_S
from vmkit.cros.messages import COLLECT_USER_LOGS, VM_READY
from vmkit.cros.notes import LOGS_PORT, READY_PORT
from vmkit.machine.launch import LaunchPlan
from vmkit.monitor.guest import LinkedGuest
from vmkit.monitor.hosting import HostServices
from vmkit.monitor.life import Life
from vmkit.monitor.logs import CappedLog, EventLog

EMPTY = CLASSES["EmptyMessage"]


class PlayedGuest:
    """A guest as the services know it."""

    name, cid = "m", 3

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = EventLog(folder / "events.jsonl")
        self.log = CappedLog(folder / "syslog.jsonl")
        self.told = 0

    def open_log(self, name: str) -> CappedLog:
        assert name == "syslog.jsonl"
        return self.log

    def tell_ready(self) -> None:
        self.told += 1

    async def call(self, port: int, path: str, request: Any) -> None:
        async with Channel(path=str(self.folder / f"vsock.sock_{port}")) as channel:
            unary: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(channel, path, type(request), EMPTY)
            await unary(request, timeout=DEADLINE_S)

    async def read(self, name: str, count: int) -> list[dict[str, Any]]:
        """The lines of a log, once it has so many."""
        async with asyncio.timeout(DEADLINE_S):
            while len(lines := (self.folder / name).read_text().splitlines()) < count:
                await asyncio.sleep(0.01)
        return [json.loads(line) for line in lines]


def run(
    folder: Path, work: Callable[[PlayedGuest, HostServices], Coroutine[None, None, None]], ready_socket: str = "x"
) -> None:
    """Plays with the services of one boot. Nothing of them is left."""

    async def play() -> None:
        guest, life, listening = PlayedGuest(folder), Life(), []

        def listen(name: str) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(folder / name))
            sock.listen()
            sock.setblocking(False)
            listening.append(sock)
            return sock

        plan = cast("LaunchPlan", SimpleNamespace(ready_socket=ready_socket))
        services = HostServices(plan, cast("LinkedGuest", guest), listen, guest.tell_ready)
        services.begin(life)
        try:
            await work(guest, services)
        finally:
            await life.cancel_all()
            guest.events.close()
            guest.log.close()
        assert not life.end.done(), life.end
        assert all(sock.fileno() < 0 for sock in listening)
        for event in await guest.read("events.jsonl", 0):
            if event["event"] == "host-services-started":
                assert not Path(f"/proc/{event['pid']}").exists()

    asyncio.run(play())


def test_records_become_lines_of_the_log(tmp_path: Path) -> None:
    async def work(guest: PlayedGuest, services: HostServices) -> None:
        await guest.call(LOGS_PORT, COLLECT_USER_LOGS, make_request({"severity": 4, "content": b" kernel[1]: forged"}))
        (record,) = await guest.read("syslog.jsonl", 1)
        check_form("syslog", record)
        keys = ("machine", "cid", "source", "priority", "facility", "ident", "uid", "pid", "claimed_pid", "text")
        known = ["m", 3, "log_collector", "err", "user", "kernel", None, None, 1, "forged"]
        assert [record[key] for key in keys] == known
        assert services.ready_s is None

    run(tmp_path, work)


def test_guests_first_report_is_told_once(tmp_path: Path) -> None:
    async def work(guest: PlayedGuest, services: HostServices) -> None:
        for _ in range(2):
            await guest.call(READY_PORT, VM_READY, EMPTY())
        await guest.call(LOGS_PORT, COLLECT_USER_LOGS, make_request({"content": b"behind it"}))
        await guest.read("syslog.jsonl", 1)
        assert guest.told == 1
        assert services.ready_s is not None

    run(tmp_path, work)


def test_process_that_dies_is_started_again_but_not_for_ever(tmp_path: Path) -> None:
    async def work(guest: PlayedGuest, services: HostServices) -> None:
        for count in (1, 2, 3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / f"vsock.sock_{LOGS_PORT}"))
                started = (await guest.read("events.jsonl", 2 * count - 1))[-1]
                os.kill(started["pid"], signal.SIGKILL)
                ended = (await guest.read("events.jsonl", 2 * count))[2 * count - 1]
                assert (ended["event"], ended["why"]) == ("host-services-ended", "signal 9 (SIGKILL)")
        last = (await guest.read("events.jsonl", 7))[-1]
        assert (last["event"], last["why"]) == ("host-services-failed", "their process died too often")

    run(tmp_path, work)


def test_machine_on_vhost_serves_nothing(tmp_path: Path) -> None:
    async def work(guest: PlayedGuest, _services: HostServices) -> None:
        assert list(tmp_path.glob("vsock.sock_*")) == []
        assert guest.told == 0

    run(tmp_path, work, ready_socket="")
