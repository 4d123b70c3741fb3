"""The ports for shared folders: who gets one, what QEMU is told, and when a device is taken out again."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.machine.conftest import Boot
from tests.vsh.live import DEADLINE_S, wait_until
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import start_machine
from vmkit.machine.stop import Control, open_control
from vmkit.machine.words import PlugFolder, Save, UnplugFolder
from vsh.registry import Entry, find_machine

pytestmark = pytest.mark.process


@pytest.fixture
def entry(boot: Boot) -> Entry:
    boot("ready-and-let-go", name="m")
    found = find_machine(name="m")
    assert found is not None
    return found


@contextlib.contextmanager
def listening(entry: Entry, name: str) -> Iterator[tuple[str, socket.socket]]:
    path = f"{entry.directory}/{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(DEADLINE_S)
        yield path, listener


def read_devices(entry: Entry) -> list[dict[str, object]]:
    """What QEMU was told of folders, in order."""
    lines = (Path(entry.directory) / Layout.EVENTS).read_text().splitlines()
    return [event for event in map(json.loads, lines) if str(event["event"]).startswith("folder-")]


def plug(control: Control, entry: Entry, tag: str, owner: int) -> socket.socket:
    with listening(entry, tag) as (path, listener):
        answer = control.ask(PlugFolder(path, tag, owner), DEADLINE_S)
        assert answer.ok, answer.error
        return listener.accept()[0]


def test_devices_have_ports_of_their_own(entry: Entry) -> None:
    with open_control(entry) as control:
        with plug(control, entry, "one", os.getpid()) as first, plug(control, entry, "two", os.getpid()) as second:
            text = (Path(entry.directory) / Layout.QMP_LOG).read_text()
            for word in ('"bus": "folder-port-0"', '"bus": "folder-port-1"', '"tag": "one"', '"vhost-user-fs-pci"'):
                assert word in text
            with listening(entry, "three") as (path, _):
                answer = control.ask(PlugFolder(path, "three", os.getpid()), DEADLINE_S)
            assert answer.error == "the machine has no free port: all 2 are taken"
            # Its port is the next one's.
            assert control.ask(UnplugFolder("one"), DEADLINE_S).ok
            first.settimeout(DEADLINE_S)
            assert first.recv(1) == b""
            with plug(control, entry, "four", os.getpid()):
                assert [event.get("port") for event in read_devices(entry)][-1] == "folder-port-0"
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.recv(1)
        assert control.ask(UnplugFolder("one"), DEADLINE_S).ok


def test_device_is_taken_out_at_the_end_of_its_process(entry: Entry) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with owner, open_control(entry) as control, plug(control, entry, "one", owner.pid) as connection:
        owner.kill()
        owner.wait()
        connection.settimeout(DEADLINE_S)
        assert connection.recv(1) == b""
        wait_until(lambda: read_devices(entry)[-1]["event"] == "folder-unplugged", "the port is taken still")


def test_what_cannot_be_plugged_leaves_the_port_free(entry: Entry) -> None:
    with open_control(entry) as control:
        answer = control.ask(PlugFolder(f"{entry.directory}/none", "one", os.getpid()), DEADLINE_S)
        assert answer.error == "cannot reach the process that serves the folder: No such file or directory"
        for tag in ("three", "four"):
            plug(control, entry, tag, os.getpid()).close()
        assert control.ask(UnplugFolder("three"), DEADLINE_S).ok
        with listening(entry, "again") as (path, _):
            answer = control.ask(PlugFolder(path, "four", os.getpid()), DEADLINE_S)
        assert answer.error == "the machine has a folder four already"


def test_machine_with_a_device_is_not_saved(image: BuiltImage, tmp_path: Path) -> None:
    append = "fake=ready-and-let-go"
    spec = MachineSpec(name="m", append=append, accelerator=Accelerator.TCG, backend=Backend.USER)
    started = start_machine(spec, build=lambda _image, _tell: image, is_owned=True)
    entry = find_machine(name="m")
    assert entry is not None
    with open_control(entry) as control, plug(control, entry, "one", os.getpid()):
        answer = control.ask(Save(str(tmp_path)), DEADLINE_S)
        assert answer.error == "this machine has a folder by virtiofs, and QEMU cannot save that"
        assert answer.hint == "end its shares: vmkit unshare m --all"
    stop.kill(entry)
    started.monitor.wait(DEADLINE_S)
