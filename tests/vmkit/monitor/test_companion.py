"""How often the monitor replaces a companion, and that its end is told where it is the cause of another failure."""

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from vmkit.errors import MachineError
from vmkit.machine.parts.part import FRONTEND_MARK, Companion, Fitting
from vmkit.monitor.companion import CompanionProcess, Restarts
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.life import EndedError, Life
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.qemu import listen_within


def test_restarts_are_limited_within_a_period_and_not_over_a_life() -> None:
    now_s = 0.0
    restarts = Restarts(limit=3, period_s=60, clock=lambda: now_s)
    for _ in range(100):
        assert restarts.take()
        now_s += 21
    now_s += 60
    assert [restarts.take() for _ in range(5)] == [True, True, True, False, False]
    now_s += 59.9
    assert not restarts.take()
    now_s += 0.2
    assert [restarts.take() for _ in range(4)] == [True, True, True, False]


def make_companion(folder: Path, script: str) -> CompanionProcess:
    plan = Companion(argv=("sh", "-c", script), title="vsock device", kind="device", log="log", device="vsock0")
    return CompanionProcess(plan, None, CappedLog(folder / "log"))


def test_step_that_fails_when_a_companion_has_ended_is_explained_by_it(tmp_path: Path) -> None:
    """The companion's end is named only when QEMU has had the time to end, and the step waits longer than that."""

    async def never(_connection: object) -> None:
        raise AssertionError

    async def fail() -> None:
        raise MachineError("QEMU does not answer")

    async def main() -> None:
        life, companion = Life(), make_companion(tmp_path, "exit 3")
        (await companion.start()).close()
        life.spawn(companion.watch(life, EventLog(tmp_path / "events"), never))
        with pytest.raises(EndedError) as caught:
            await life.or_end(fail())
        assert caught.value.end.brief == "the vsock device ended with status 3"
        await life.cancel_all()

    asyncio.run(main())


def test_companion_that_is_slow_to_end_is_named_when_qemu_has_refused_its_device(tmp_path: Path) -> None:
    """As on a busy host."""

    async def main() -> None:
        companion = make_companion(tmp_path, "sleep 1.5; exit 3")
        (await companion.start()).close()
        with pytest.raises(MachineError, match="the vsock device ended with status 3"):
            await companion.raise_if_ended()

    asyncio.run(main())


def test_connection_that_no_companion_will_answer_ends_with_the_companion(tmp_path: Path) -> None:
    """It waits in the backlog. The monitor itself opens such ones, and waited for an answer at its own end."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            listener = listen_within(tmp_path / "vsock.sock", stack)
            plan = Companion(argv=("true",), title="vsock device", kind="device", log="log", device="vsock0")
            companion = CompanionProcess(plan, listener, CappedLog(tmp_path / "log"))
            (await companion.start()).close()
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(tmp_path / "vsock.sock"))
                await companion.stop()
                with pytest.raises(ConnectionResetError):
                    client.recv(1)

    asyncio.run(main())


def test_companion_that_serves_gets_one_connection_at_a_socket_without_a_path(tmp_path: Path) -> None:
    """virtiofsd accepts by itself. No other program can come before QEMU, or after it."""

    def listen(name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(tmp_path / name))
        listener.listen()
        listener.setblocking(False)
        return listener

    script = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.accept()[0].sendall(b'served')"
    plan = Companion(
        argv=(sys.executable, "-c", script, FRONTEND_MARK),
        title="virtiofsd", kind="virtiofsd", log="log", device="root-fs", serve="v.sock", is_vital=True,
    )  # fmt: skip

    async def main() -> bytes:
        async with contextlib.AsyncExitStack() as stack:
            life, events = Life(), EventLog(tmp_path / "events")
            with contextlib.ExitStack() as inner:
                log = CappedLog(tmp_path / "log")
                fitting = Fitting("share", fd_name="root-fd", companion=plan)
                fittings = Fittings((fitting,), life, events, listen, lambda _name: log)
                descriptors = await fittings.open(None, inner)
                assert list(tmp_path.glob("*.sock")) == []
                with socket.socket(fileno=os.dup(descriptors["share"])) as qemu:
                    qemu.settimeout(20)
                    said = await asyncio.to_thread(qemu.recv, 100)
            stack.push_async_callback(life.cancel_all)
            # A vital one takes the machine with it, and is not started again.
            life.is_ready = True
            end = await asyncio.wait_for(asyncio.shield(life.end), 20)
            assert end.brief == "the virtiofsd ended with status 0"
            return said

    assert asyncio.run(main()) == b"served"
