"""A share from the verb to the kernel, without a guest: a vshd in a mount namespace of its own mounts the folder."""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.forward.test_forward import FakeMachine
from tests.vsh.live import DEADLINE_S, Vshd, wait_until
from tests.vshd.test_init import needs_namespace
from tests.vshd.test_root import BUSYBOX, ForeignRoot, make_folder
from vmkit.errors import MachineError
from vmkit.machine import programs
from vmkit.machine.running import find_machine
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import read_shares
from vmkit.shares.start import end_share, open_share, start_share
from vsh.address import find_by_name
from vsh.client import Client
from vsh.errors import VshError

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and /dev/fuse"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    vshd = Vshd(tmp_path, wrapper=("unshare", "--mount", "--propagation", "private", "--"))
    machine = FakeMachine(runtime, "my", 77, {9001: str(vshd.path)})
    yield machine
    with contextlib.suppress(OSError):
        # A test may have ended it.
        machine.end()
    vshd.stop()


@needs_namespace
@needs_fuse
def test_share_is_mounted_served_and_revoked(machine: FakeMachine, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("hello")
    place = SharedPlace(folder, str(tmp_path / "there/deep folder"))
    client = Client(find_by_name("my"))
    with open_share("my", place) as share:
        assert read_shares("my") == [share]
        done = client.run(["sh", "-c", f"cd '{place.guest}' && cat file && echo new > made && ls"], text=True)
        assert (done.stdout, done.stderr) == ("hellofile\nmade\n", "")
        # Not in this namespace.
        assert os.listdir(place.guest) == []
        with pytest.raises(VshError, match="already") as caught:
            start_share("my", place)
        # As a shell reads it.
        assert caught.value.hint == f"choose another place, or end that share: vmkit unshare my '{place.guest}'"
    assert read_shares("my") == []
    assert (folder / "made").read_text() == "new\n"
    wait_until(lambda: not (tmp_path / "there").exists(), "the place is there still")


@needs_namespace
@needs_fuse
def test_python_shares_and_unshares(machine: FakeMachine, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("hello")
    found = find_machine("my")
    place = found.share(folder, str(tmp_path / "there"), read_only=True)
    assert place == str(tmp_path / "there")
    assert found.run(["cat", f"{place}/file"], text=True).stdout == "hello"
    assert found.run(["touch", f"{place}/new"]).exit != 0
    found.unshare(place)
    with pytest.raises(MachineError, match="my has no share"):
        found.unshare(folder)
    found.share(folder, place, by="fuse")
    assert [share.transport for share in read_shares("my")] == ["fuse"]
    found.unshare(folder)
    assert read_shares("my") == []
    with pytest.raises(VshError, match="no transport of shares has the name 'nfs'"):
        found.share(folder, place, by="nfs")


@needs_namespace
@needs_fuse
def test_process_that_is_killed_ends_the_mount(machine: FakeMachine, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    share = start_share("my", SharedPlace(folder, str(tmp_path / "there")))
    os.kill(share.pid, signal.SIGKILL)
    wait_until(lambda: not (tmp_path / "there").exists(), "the place is there still")
    assert read_shares("my") == []
    end_share(share)


@needs_namespace
@needs_fuse
def test_end_of_the_machine_ends_the_process(machine: FakeMachine, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    start_share("my", SharedPlace(folder, str(tmp_path / "there")))
    machine.end()
    wait_until(lambda: read_shares("my") == [], "the share is there still")


@needs_namespace
@needs_fuse
@pytest.mark.skipif(BUSYBOX is None, reason="no busybox to make a root of")
def test_share_is_in_the_root_of_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vshd itself is outside of it, and takes no code from there."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    (tmp_path / "folder").mkdir()
    with contextlib.ExitStack() as stack:
        root = ForeignRoot(make_folder(tmp_path / "foreign"))
        stack.callback(root.stop)
        vshd = Vshd(tmp_path, [root.flag])
        stack.callback(vshd.stop)
        stack.callback(FakeMachine(runtime, "my", 77, {9001: str(vshd.path)}).end)
        client = Client(find_by_name("my"))
        with open_share("my", SharedPlace(tmp_path / "folder", "/mnt/deep")):
            done = client.run(["sh", "-c", "echo x > /mnt/deep/made; ls /mnt/deep"], text=True, user="root")
            assert (done.stdout, done.stderr) == ("made\n", "")
        assert (tmp_path / "folder/made").read_text() == "x\n"
        wait_until(lambda: client.run(["ls", "/mnt"], user="root").returncode, "the place is there still")
    assert not (tmp_path / "foreign/run/was-loaded").exists()


def test_machine_that_does_not_answer_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    machine = FakeMachine(runtime, "my", 77, {})
    with pytest.raises(VshError, match="nothing listens on port 9001 of"):
        start_share("my", SharedPlace(tmp_path, "/mnt/x"))
    assert read_shares("my") == []
    machine.end()


def test_interruption_does_not_wait_for_a_guest_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(programs, "END_PROGRAM_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        silent.settimeout(DEADLINE_S)
        machine = FakeMachine(runtime, "my", 77, {9001: str(tmp_path / "silent.sock")})

        def interrupt(ours: socket.socket, _module: str, _what: str, request: dict[str, object]) -> None:
            ours.sendall(json.dumps(request).encode() + b"\n")
            # The process waits for the guest's answer from here on.
            held.append(silent.accept()[0])
            held[0].settimeout(DEADLINE_S)
            held[0].recv(1)
            raise KeyboardInterrupt

        held: list[socket.socket] = []
        monkeypatch.setattr(programs, "_ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start_share("my", SharedPlace(tmp_path, "/mnt/x"))
        assert programs._STARTED[-1].returncode == -signal.SIGKILL
        held[0].close()
        machine.end()
    assert read_shares("my") == []
