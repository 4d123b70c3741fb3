"""The registry's writing side: names and CIDs are given once, entries are whole, only what is stale goes."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.entries import folder as entries_folder
from vmkit.entries.entry import discard
from vmkit.entries.folder import open_runtime_directory
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.machine.registry import find_state_directory, reserve, sweep, write_record
from vmkit.machine.vhost import VhostClaim
from vsh.errors import VshError
from vsh.registry import find_machine, read_machines


@pytest.fixture
def machines(folders: Path) -> Path:
    open_runtime_directory()
    return folders / "runtime" / "machines"


def names(machines: Path) -> list[str]:
    return sorted(path.name for path in machines.iterdir())


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def make_stale(machines: Path, name: str, text: str = "{}") -> Path:
    directory = machines / name
    directory.mkdir(mode=0o700)
    (directory / "lock").write_bytes(b"")
    (directory / "machine.json").write_text(text)
    return directory


def test_reservation_is_a_whole_entry_while_it_lasts(machines: Path) -> None:
    with reserve(None, None, "tiny", {"backend": "user", "pid": 7}) as reservation:
        found = find_machine(name="tiny")
        assert found is not None
        assert (found.cid, found.state, found.backend, found.pid) == (3, "starting", "user", 7)
        assert reservation.directory == machines / "tiny"
        assert (machines / "tiny").stat().st_mode & 0o777 == 0o700
        assert (machines / "tiny" / "machine.json").stat().st_mode & 0o777 == 0o600
    assert names(machines) == []


def test_reservation_that_a_monitor_holds_stays(machines: Path) -> None:
    with reserve("m", None, "tiny", {}) as reservation:
        copy = os.dup(reservation.lock_fd)
    try:
        assert names(machines) == ["m"]
        assert find_machine(name="m") is not None
    finally:
        os.close(copy)
    sweep()
    assert names(machines) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_reservation_is_undone_by_whatever_interrupts_it(machines: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), reserve(None, None, "tiny", {}):
        raise error
    assert names(machines) == []


def test_names_and_cids_are_given_once(machines: Path) -> None:
    with reserve(None, None, "tiny", {}), reserve(None, None, "tiny", {}) as second:
        assert (second.name, second.cid) == ("tiny-2", 4)
        with pytest.raises(MachineError, match="a machine named 'tiny' is running"), reserve("tiny", None, "tiny", {}):
            pass
        with pytest.raises(MachineError, match="CID 4 is in use by the machine 'tiny-2'"), reserve("x", 4, "tiny", {}):
            pass
        assert names(machines) == ["tiny", "tiny-2"]


def test_numbered_name_of_a_long_image_stays_a_name(machines: Path) -> None:
    image = "x" * 32
    with reserve(None, None, image, {}), reserve(None, None, image, {}) as second:
        assert second.name == "x" * 30 + "-2"


def test_image_name_that_is_no_machines_name_is_refused(machines: Path) -> None:
    with pytest.raises(ConfigError), reserve(None, None, "no name", {}):
        pass


def test_two_processes_at_once_get_different_names(machines: Path) -> None:
    script = (
        "import sys\n"
        "from vmkit.machine.registry import reserve\n"
        "with reserve(None, None, 'tiny', {}) as r:\n"
        "    print(r.name, r.cid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    lines = [process.stdout.readline().split() for process in processes if process.stdout]
    for process in processes:
        process.communicate("")
    assert sorted(line[1] for line in lines) == ["3", "4", "5", "6"]
    assert len({line[0] for line in lines}) == 4
    assert names(machines) == []


def test_reader_at_the_same_moment_disturbs_no_reservation(machines: Path) -> None:
    """A reader shares every lock it sees; an entry must not be visible before its maker has the lock."""
    stop = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not stop.is_set():
            seen.extend(machine.state for machine in read_machines())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(100):
            with reserve("m", None, "tiny", {}):
                pass
    finally:
        stop.set()
        thread.join()
    assert set(seen) <= {"starting"}


def test_sweeper_is_never_taken_for_a_monitor(machines: Path) -> None:
    make_stale(machines, "old", json.dumps({"name": "old", "cid": 3}))
    with (machines / "old" / "lock").open() as lock:
        # What sweep() holds while it removes.
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert read_machines() == []
        sweep()
    assert names(machines) == []


def test_stale_entries_are_swept_and_live_ones_are_not(machines: Path) -> None:
    make_stale(machines, "stale")
    live = make_stale(machines, "live")
    with hold(live / "lock"):
        sweep()
        assert names(machines) == ["live"]


def test_leftovers_of_making_and_removing_are_swept(machines: Path) -> None:
    for name in (".new.a", ".old.b.77"):
        (machines / name).mkdir()
        (machines / name / "console.log").write_text("x")
    sweep()
    assert names(machines) == []


def test_folder_that_was_never_an_entry_is_left_alone(machines: Path) -> None:
    """Somebody may name a directory of theirs the runtime directory, and have a folder `machines` in it."""
    (machines / "holiday").mkdir()
    (machines / "holiday" / "photo").write_text("dear")
    (machines / "notes.txt").write_text("dear")
    sweep()
    assert names(machines) == ["holiday", "notes.txt"]
    with reserve(None, None, "holiday", {}) as reservation:
        assert reservation.name == "holiday-2"


def test_live_entry_with_an_unreadable_record_keeps_its_name(machines: Path) -> None:
    broken = make_stale(machines, "tiny", "{")
    with hold(broken / "lock"):
        with reserve(None, None, "tiny", {}) as reservation:
            assert reservation.name == "tiny-2"
        with pytest.raises(MachineError, match="'tiny' is running"), reserve("tiny", None, "tiny", {}):
            pass
        assert (broken / "machine.json").exists()


def test_sweep_without_a_registry_makes_none(folders: Path) -> None:
    sweep()
    assert list((folders / "runtime").iterdir()) == []


def test_discard_frees_the_name_first(machines: Path) -> None:
    directory = make_stale(machines, "m")
    left = machines / f".old.m.{os.getpid()}"
    left.mkdir()
    (left / "rest").write_text("of a process with the same number")
    discard(directory)
    assert names(machines) == []
    discard(directory)


def test_record_is_replaced_whole(machines: Path) -> None:
    write_record(machines, {"name": "a"})
    before = (machines / "machine.json").open()
    write_record(machines, {"name": "b"})
    with before:
        assert json.load(before) == {"schema": 1, "name": "a"}
    assert json.loads((machines / "machine.json").read_text())["name"] == "b"


@pytest.mark.parametrize("length", [40, 90])
def test_socket_path_too_long_for_the_kernel_is_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    root = folders / ("r" * length)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(root))
    with contextlib.ExitStack() as stack:
        longest = len(os.fsencode(root / "machines" / "m" / "vsock.sock_4294967295"))
        if longest > 107:
            stack.enter_context(pytest.raises(HostError, match=f"has {longest} bytes, and the kernel takes 107"))
        with reserve("m", None, "tiny", {}):
            assert longest <= 107
    assert names(root / "machines") == []


def test_runtime_directory_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir(mode=0o700)
    (tmp_path / "dir" / "machines").write_text("")
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "dir"))
    with pytest.raises(HostError, match="cannot make the runtime directory"):
        open_runtime_directory()
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(VshError, match="cannot look at the runtime directory"):
        open_runtime_directory()


def test_full_disk_is_told_and_leaves_nothing(machines: Path) -> None:
    """A process that may write no byte meets EFBIG where a full disk gives ENOSPC."""
    script = (
        "import resource\n"
        "from vmkit.errors import HostError\n"
        "from vmkit.machine.registry import reserve\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    with reserve(None, None, 'tiny', {}): pass\n"
        "except HostError as error: print(error.brief)\n"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("cannot write to the runtime directory")
    assert os.strerror(errno.EFBIG) in done.stdout
    assert names(machines) == []


def test_registry_held_for_too_long_is_told(machines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_folder, "REGISTRY_DEADLINE_S", 0.05)
    started_s = time.monotonic()
    with hold(machines.parent / "registry.lock"), pytest.raises(HostError, match="another vmkit has held") as caught:
        sweep()
    assert "Ctrl-Z" in caught.value.hint
    assert time.monotonic() - started_s < 5


class FakeDoor:
    """/dev/vhost-vsock of a host where some CIDs are taken."""

    def __init__(self, taken: set[int]) -> None:
        self.taken = taken
        self.open: set[int] = set()

    def open_device(self) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.open.add(fd)
        return fd

    def set_guest_cid(self, fd: int, cid: int) -> None:
        if cid in self.taken:
            raise OSError(errno.EADDRINUSE, "taken")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_free_cid_is_one_that_registry_and_kernel_both_call_free(machines: Path) -> None:
    claim = VhostClaim(FakeDoor({4, 5}))
    with reserve("a", 3, "tiny", {}), reserve("b", None, "tiny", {}, claim.take) as reservation:
        assert reservation.cid == 6
        assert claim.fd is not None
        assert is_open(claim.fd)
    claim.close()
    assert claim.fd is None


def test_asked_cid_that_the_kernel_calls_taken_is_refused(machines: Path) -> None:
    door = FakeDoor({7})
    with (
        pytest.raises(MachineError, match="CID 7 is in use on this host"),
        reserve("a", 7, "t", {}, VhostClaim(door).take),
    ):
        pass
    assert not any(is_open(fd) for fd in door.open)
    assert names(machines) == []


def test_search_for_a_free_cid_ends(machines: Path) -> None:
    door = FakeDoor(set(range(3, 10_000)))
    with (
        pytest.raises(MachineError, match="no free CID among the 256"),
        reserve("a", None, "t", {}, VhostClaim(door).take),
    ):
        pass
    assert not any(is_open(fd) for fd in door.open)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"VMKIT_STATE_DIR": "/a/b", "XDG_STATE_HOME": "/c", "HOME": "/h"}, "/a/b"),
        ({"XDG_STATE_HOME": "/c", "HOME": "/h"}, "/c/vmkit"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/vmkit"),
        ({"HOME": "/h"}, "/h/.local/state/vmkit"),
        ({"VMKIT_STATE_DIR": "here"}, "/usr/here"),
    ],
)
def test_state_directory_follows_the_environment(
    environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VMKIT_STATE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir("/usr")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert str(find_state_directory()) == expected


def test_state_directory_of_a_user_without_home_or_name(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VMKIT_STATE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert find_state_directory() == folders / "runtime" / "ended"
