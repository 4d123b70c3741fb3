"""A snapshot in the background, with a QEMU and a guest that play: which `up` starts a builder, and what ends one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import read_descriptors
from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import DEADLINE_S, Done, Vmkit
from tests.vmkit.machine.hurry import hurry_builder
from tests.vmkit.machine.test_start import is_alive, until
from vmkit.builder.start import LOG
from vmkit.machine.builders import Builder, read_builders
from vmkit.machine.restore import open_store
from vmkit.snapshots.boots import BOOTS, DUE_BOOTS, read_boots, write_boots
from vsh.registry import SAVING, read_machines

# Of a builder with the lowest priority, on a host that is busy with other tests.
BUILDER_DEADLINE_S = 300
LINE = "  a snapshot is made in the background; the next start is quicker"
SCENARIO, OPTIONS = "ready-to-be-saved", ("--memory", "64M")


class World:
    """`vmkit up` of one machine, again and again; at most one runs."""

    def __init__(self, vmkit: Vmkit, recipe: str, folders: Path) -> None:
        self.vmkit, self.recipe, self.folders = vmkit, recipe, folders
        self.snapshots = open_store().folder
        # The builder's fake QEMU waits for a writer of this when it saves.
        self.gate = folders / "gate"

    def words(self, *more: str) -> tuple[str, ...]:
        options = ("--accel", "tcg", "--backend", "user", "--append", f"fake={SCENARIO}", *OPTIONS)
        return ("up", self.recipe, "--name", "m", *options, *more)

    def up(self, *more: str) -> Done:
        """One more start, and the machine's end."""
        done = self.vmkit(*self.words(*more))
        assert done.status == 0, done.err
        self.vmkit("kill", "m")
        return done

    def boot_twice(self) -> None:
        """With a builder afterwards."""
        assert LINE not in self.up().out.splitlines()
        assert LINE in self.up().out.splitlines()

    def await_no_builder(self) -> None:
        hurry_builder()
        until(lambda: not read_builders(), BUILDER_DEADLINE_S)

    def await_saving(self, *, is_hurried: bool = True) -> Builder:
        """The builder, when its machine is ready and is being saved."""
        if is_hurried:
            hurry_builder()

        def is_ready() -> bool:
            return any(one.name.startswith(SAVING) and one.state == "ready" for one in read_machines())

        until(is_ready, BUILDER_DEADLINE_S)
        (builder,) = read_builders()
        return builder

    def check_nothing_is_left(self) -> None:
        until(lambda: read_machines() == [] and read_builders() == [], BUILDER_DEADLINE_S)
        for folder in ("machines", "builders"):
            assert list((self.folders / "runtime" / folder).iterdir()) == []
        assert list((self.snapshots / "tmp").iterdir()) == []
        assert open_store().read_all() == []

    def read_log(self) -> str:
        return (self.snapshots / LOG).read_text()


@pytest.fixture
def world(vmkit: Vmkit, recipe: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("VMKIT_BACKGROUND_SNAPSHOTS", "on")
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(folders / "cache" / "snapshots"))
    monkeypatch.delenv("CI", raising=False)
    yield World(vmkit, recipe, folders)
    vmkit("kill", "--all")


@pytest.fixture
def slow(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A save waits until the test lets it go on, or for ever."""
    os.mkfifo(world.gate)
    monkeypatch.setenv("FAKE_SAVE", f"wait-for:{world.gate}")
    return world


def test_second_boot_starts_a_builder_and_the_third_start_restores(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.boot_twice()
    world.await_no_builder()
    (made,) = open_store().read_all()
    assert "made in " in world.read_log()
    assert read_boots(world.snapshots) == {}
    monkeypatch.setenv("FAKE_RESTORE", "thaw")
    assert f"from the snapshot {made.name}" in world.up().out
    assert open_store().read_all() == [made]


def test_what_is_being_made_is_listed_and_in_no_way(slow: World) -> None:
    """Its machine has one of the last CIDs, and `kill` without a name means the user's machine."""
    slow.up()
    assert slow.vmkit(*slow.words()).status == 0
    builder = slow.await_saving()
    assert sorted((one.name, one.cid > 1 << 31) for one in read_machines()) == [("m", False), (builder.machine, True)]
    assert builder.machine in slow.vmkit("list").out
    (row,) = slow.vmkit("snapshot", "list").out.splitlines()[1:]
    assert row.split() == [builder.key[:12], "my", "64", "MiB", "0", "MiB", "being", "made"]
    listed = json.loads(slow.vmkit("snapshot", "list", "--json").out)
    check_form("snapshots", listed)
    assert [(one["state"], one["made"], one["error"]) for one in listed] == [("being made", None, None)]
    done = slow.vmkit("kill")
    assert (done.status, done.out) == (0, "m is gone\n"), done.err


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("VMKIT_BACKGROUND_SNAPSHOTS", "off")])
def test_no_boot_is_counted_where_it_is_off(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for _ in range(3):
        assert LINE not in world.up().out.splitlines()
    assert not world.snapshots.exists()


def test_other_values_are_refused_before_anything_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_BACKGROUND_SNAPSHOTS", "no")
    done = world.vmkit(*world.words())
    assert (done.status, done.err) == (64, "vmkit: VMKIT_BACKGROUND_SNAPSHOTS must be on or off, not 'no'\n")
    assert read_machines() == []


def test_demanded_boot_neither_counts_nor_starts_a_builder(world: World) -> None:
    for _ in range(3):
        world.up("--boot")
    assert read_boots(world.snapshots) == {}
    world.boot_twice()


@pytest.mark.parametrize("more", [("--gdb",), ("--rwdisk", "{disk}")])
def test_machine_that_cannot_be_saved_is_not_counted(world: World, tmp_path: Path, more: tuple[str, ...]) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    for _ in range(2):
        world.up(*(word.format(disk=disk) for word in more))
    assert read_boots(world.snapshots) == {}


def test_json_and_quiet_have_no_line_of_it(world: World) -> None:
    assert len(world.up("-q").out.splitlines()) == 1
    assert json.loads(world.up("--json").out)["started_by"] == "boot"
    assert len(read_builders()) == 1
    assert len(world.up("-q").out.splitlines()) == 1


def test_starts_at_once_start_one_builder(slow: World) -> None:
    slow.up()
    argv = [sys.executable, "-m", "vmkit", *slow.words()]
    argv[argv.index("m")] = "{name}"
    processes = [
        subprocess.Popen([word.format(name=name) for word in argv], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b", "c")
    ]
    lines = [process.communicate(timeout=DEADLINE_S)[0].splitlines() for process in processes]
    assert sorted(LINE in one for one in lines) == [False, False, True]
    assert len(read_builders()) == 1


def has_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN (number 21)."""
    text = Path("/proc/self/status").read_text()
    return bool(int(text.partition("CapEff:")[2].split()[0], 16) >> 21 & 1)


def test_builder_is_a_process_of_its_own_with_the_lowest_priority(slow: World) -> None:
    slow.boot_twice()
    builder = slow.await_saving(is_hurried=False)
    machine = next(one for one in read_machines() if one.name == builder.machine)
    qemu = int(str(machine.record["qemu_pid"]))
    for pid in (builder.pid, machine.pid, qemu):
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    for pid in (builder.pid, machine.pid):
        group = Path(f"/proc/{pid}/autogroup")
        # The kernel takes a few of these a second from all that have no CAP_SYS_ADMIN, such as a container's root.
        assert not has_admin() or not group.exists() or group.read_text().endswith(" nice 19\n")
    assert os.getsid(builder.pid) == builder.pid != os.getsid(0)
    # Its null device, its log, its lock; the folder and the lock of the snapshot; its machine's sockets.
    files = {
        name for _, name in read_descriptors(builder.pid) if name.startswith("/") and not name.startswith("/memfd:")
    }
    ours = (str(slow.snapshots), f"{slow.folders}/runtime/builders/{builder.key}/lock", "/dev/null")
    assert all(name.startswith(ours) or builder.machine in name for name in files), files


def test_all_machines_end_with_the_builder(slow: World) -> None:
    slow.boot_twice()
    builder = slow.await_saving()
    done = slow.vmkit("down", "--all")
    assert (done.status, done.out) == (0, "the snapshot of my is no longer made\n"), done.err
    assert not is_alive(builder.pid)
    slow.check_nothing_is_left()
    # It ended on demand, which is no failure: the next boot starts another one.
    assert LINE in slow.up().out


def test_killed_builder_leaves_nothing_and_holds_nothing_up(slow: World) -> None:
    slow.boot_twice()
    builder = slow.await_saving()
    (half,) = (slow.snapshots / "tmp").iterdir()
    os.kill(builder.pid, signal.SIGKILL)
    until(lambda: read_machines() == [], BUILDER_DEADLINE_S)
    assert slow.vmkit("snapshot", "list").out == ""
    assert LINE in slow.up().out
    assert not half.exists()
    (next_one,) = read_builders()
    assert (next_one.key, next_one.pid == builder.pid) == (builder.key, False)


def test_failure_is_listed_and_not_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SAVE", "refuse-the-state")
    world.boot_twice()
    world.await_no_builder()
    for _ in range(2):
        assert LINE not in world.up().out
    assert "failed: 'saving-" in world.read_log()
    done = world.vmkit("snapshot", "list")
    assert done.out.splitlines()[1].endswith("failed")
    assert "was not made: 'saving-" in done.err and "QEMU refused the state" in done.err
    listed = json.loads(world.vmkit("snapshot", "list", "--json").out)
    check_form("snapshots", listed)
    assert [one["state"] for one in listed] == ["failed"]
    # A day later the host may be another one.
    known = read_boots(world.snapshots)
    (key,) = known
    write_boots(world.snapshots, {key: type(known[key])("my", 64, DUE_BOOTS, time.time(), "why", 1.0)})
    assert LINE in world.up().out


def test_person_who_makes_the_snapshot_does_not_wait_for_the_builder(
    slow: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.boot_twice()
    builder = slow.await_saving()
    monkeypatch.delenv("FAKE_SAVE")
    words = [word for word in slow.words()[1:] if word not in ("--name", "m")]
    done = slow.vmkit("snapshot", "make", *words)
    assert done.status == 0, done.err
    assert "ending the process that makes this snapshot in the background" in done.err
    assert f"snapshot {builder.key[:12]} of my made in " in done.out
    assert read_builders() == [] and read_machines() == []


def test_broken_count_is_no_error(world: World) -> None:
    world.snapshots.mkdir(mode=0o700)
    (world.snapshots / BOOTS).write_text("{")
    world.boot_twice()


def test_folder_that_cannot_be_written_to_is_no_error(world: World) -> None:
    world.snapshots.write_text("")
    for _ in range(2):
        assert LINE not in world.up().out
