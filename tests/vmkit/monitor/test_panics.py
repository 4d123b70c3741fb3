"""Panics that are kept: the whole of `up` with a QEMU that plays them, and its dump of the guest's memory."""

import json
import os
from pathlib import Path

import pytest

from tests.vmkit.crashes.test_dump import flatten
from tests.vmkit.machine.conftest import Boot
from tests.vmkit.memory.kernel_maker import BANNER_TEXT, RELEASE, KernelMaker
from vmkit.crashes.record import DumpFormat
from vmkit.crashes.store import KeptCrash, list_all
from vmkit.errors import MachineError
from vmkit.machine import start
from vmkit.machine.registry import find_state_directory
from vmkit.machine.stop import wait_for_end
from vsh.registry import find_machine, read_machines

REASON = "the guest's kernel panicked: Fatal exception"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's log in the memory of the fake QEMU's guest."""
    kernel = KernelMaker()
    kernel.log(BANNER_TEXT)
    (tmp_path / "memory").write_bytes(kernel.memory)
    monkeypatch.setenv("FAKE_MEMORY", str(tmp_path / "memory"))


def take_crash(folders: Path) -> KeptCrash:
    (kept,) = list_all(folders / "data" / "crashes")
    assert kept.crash is not None
    return kept


def read_events(name: str) -> dict[str, dict[str, object]]:
    lines = (find_state_directory() / name / "events.jsonl").read_text().splitlines()
    return {event["event"]: event for event in map(json.loads, lines)}


def play(boot: Boot, scenario: str, **fields: object) -> None:
    started = boot(scenario, **fields)
    entry = find_machine(name=started.name)
    if entry is not None:
        wait_for_end(entry, 20)
    started.monitor.wait(20)


def test_panic_is_kept_with_the_kernels_log(boot: Boot, folders: Path, memory: None) -> None:
    play(boot, "ready-then-panic")
    kept = take_crash(folders)
    assert (kept.machine, kept.number) == ("tiny", 1)
    assert kept.crash is not None
    assert (kept.crash.brief, kept.crash.dump, kept.crash.trouble) == (REASON, None, "")
    assert (kept.crash.image, kept.crash.kernel) == ("tiny", RELEASE)
    assert BANNER_TEXT in kept.dmesg.read_bytes()
    assert kept.dmesg.stat().st_mode & 0o777 == 0o600


def test_dump_is_kept_as_qemu_wrote_it(
    boot: Boot, folders: Path, memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\x7fELF" + os.urandom(100_000) + bytes(3 << 20) + b"end"
    (tmp_path / "dump").write_bytes(data)
    monkeypatch.setenv("FAKE_DUMP", str(tmp_path / "dump"))
    play(boot, "ready-then-panic", vmcore="elf")
    kept = take_crash(folders)
    assert kept.crash is not None
    assert (kept.crash.brief, kept.crash.dump, kept.crash.dump_bytes) == (REASON, DumpFormat.ELF, len(data))
    assert kept.dump.read_bytes() == data
    assert kept.dump.stat().st_mode & 0o777 == 0o600
    events = read_events("tiny")
    assert events["guest_panicked"]["data"] == {"action": "pause"}
    assert events["vmcore"]["bytes"] == len(data)


def test_kdump_is_kept_as_a_file_that_its_readers_know(
    boot: Boot, folders: Path, memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump").write_bytes(flatten([(0, b"KDUMP   "), (4096, b"pages")]))
    monkeypatch.setenv("FAKE_DUMP", str(tmp_path / "dump"))
    play(boot, "ready-then-panic", vmcore="kdump")
    kept = take_crash(folders)
    assert kept.crash is not None
    assert kept.crash.dump is DumpFormat.KDUMP
    assert kept.dump.read_bytes() == b"KDUMP   ".ljust(4096, b"\0") + b"pages"


def test_panic_of_a_boot_is_kept_with_its_dump(
    boot: Boot, folders: Path, memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump").write_bytes(b"\x7fELF")
    monkeypatch.setenv("FAKE_DUMP", str(tmp_path / "dump"))
    with pytest.raises(MachineError, match="kernel panicked: VFS: Unable to mount root fs"):
        boot("panic", vmcore="elf")
    kept = take_crash(folders)
    assert kept.crash is not None
    assert kept.crash.dump is DumpFormat.ELF


@pytest.mark.parametrize(
    ("what", "why"),
    [("refuse", "QEMU refused 'dump-guest-memory': dump: no dump today"), ("endless", "the dump is larger than 4 MiB")],
)
def test_panic_is_kept_without_the_dump_that_failed(
    boot: Boot, folders: Path, memory: None, monkeypatch: pytest.MonkeyPatch, what: str, why: str
) -> None:
    monkeypatch.setenv("FAKE_DUMP", what)
    monkeypatch.setattr(start, "MAX_DUMP_BYTES", 4 << 20)
    play(boot, "ready-then-panic", vmcore="elf")
    kept = take_crash(folders)
    assert kept.crash is not None
    assert (kept.crash.dump, kept.crash.trouble) == (None, why)
    assert not kept.dump.exists()
    assert read_events("tiny")["no-vmcore"]["why"] == why


def test_machine_that_did_not_panic_keeps_no_crash(boot: Boot, folders: Path, memory: None) -> None:
    play(boot, "ready-then-die", vmcore="elf")
    assert list_all(folders / "data" / "crashes") == []


def test_panic_ends_the_machine_where_nothing_can_be_kept(boot: Boot, folders: Path, memory: None) -> None:
    (folders / "data" / "crashes").write_text("a file in the way")
    play(boot, "ready-then-panic")
    assert "no-crash" in read_events("tiny")
    assert read_events("tiny")["end"]["brief"] == REASON


def test_crashes_that_cannot_be_listed_do_not_hide_how_the_machine_ended(
    boot: Boot, folders: Path, memory: None
) -> None:
    crashes = folders / "data" / "crashes"
    crashes.mkdir()
    (crashes / "loop").symlink_to("loop")
    play(boot, "ready-then-panic")
    assert (crashes / "tiny" / "1" / "dmesg").is_file()
    assert read_events("tiny")["end"]["brief"] == REASON
    assert read_machines() == []
