"""crashes: lists those of all machines, shows one and how to open its dump, and removes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from tests.vmkit.crashes.test_store import CRASH, keep
from tests.vsh.test_text import HOSTILE
from vmkit.crashes.record import Crash, CrashKind, DumpFormat, FailedService, Program, ServiceEnd
from vmkit.crashes.store import DMESG

PROGRAM = Program(
    *(7, 1000, 100, 6, "web", ("web", "--name", "two words"), "/usr/bin/web (deleted)", "0::/"),
    is_contained=True,
    is_whole=False,
)

SERVICE = FailedService(
    *("web.service", "exit-code", ServiceEnd.EXITED, 3, 41, "01" * 16, 1_700_000_000, 4),
    is_restarted=True,
    log=("last words", "Failed with result"),
)


@pytest.fixture
def root(folders: Path) -> Path:
    return folders / "data" / "crashes"


def test_crash_of_a_machine_is_listed_after_its_end(up: Vmkit, vmkit: Vmkit) -> None:
    assert "no crash is kept" in vmkit("crashes").err
    up("panic", "-q")
    lines = vmkit("crashes").out.splitlines()
    assert lines[0].split() == ["NAME", "NUMBER", "TIME", "SIZE", "DUMP", "WHAT"]
    assert lines[1].split()[:2] == ["my", "1"]
    assert "VFS: Unable to mount root fs" in lines[1]
    assert vmkit("crashes", "my").out.splitlines()[1:] == lines[1:]
    assert "no crash of 'other' is kept" in vmkit("crashes", "other").err
    assert "crashes" in vmkit("prune", "--dry-run").out


def test_shown_crash_says_how_to_open_its_dump(vmkit: Vmkit, root: Path) -> None:
    crash = Crash(
        CrashKind.PANIC, 1.0, "a panic", "tiny", "0" * 64, "6.12.0-amd64", DumpFormat.ELF, 268 << 20, vmlinux=""
    )
    folder = keep(root, "web", crash, dump_bytes=1 << 20)
    shown = vmkit("crashes", "web", "show").out
    assert "web 1: a panic" in shown
    assert "image:   tiny, kernel 6.12.0-amd64" in shown
    assert f"drgn -c {folder}/vmcore -s /usr/lib/debug/boot/vmlinux-6.12.0-amd64" in shown
    assert f"crash /usr/lib/debug/boot/vmlinux-6.12.0-amd64 {folder}/vmcore" in shown
    assert "linux-image-6.12.0-amd64-dbg" in shown
    assert "268.0 MiB, 1.0 MiB of it on the disk" in shown
    assert shown.endswith("[    0.000000] Linux version 6.12.0\n")


def test_kernel_of_the_users_own_is_named_with_its_symbols(vmkit: Vmkit, root: Path, tmp_path: Path) -> None:
    vmlinux = tmp_path / "vmlinux"
    vmlinux.write_bytes(b"")
    keep(root, "web", Crash(CrashKind.PANIC, 1.0, "p", dump=DumpFormat.KDUMP, vmlinux=str(vmlinux)))
    shown = vmkit("crashes", "web", "show", "1").out
    assert f"crash {vmlinux} " in shown
    assert "drgn -c" not in shown
    assert "Debian has" not in shown


def test_dump_that_is_missing_is_explained(vmkit: Vmkit, root: Path) -> None:
    keep(root, "web", Crash(CrashKind.PANIC, 1.0, "p", trouble="the dump is larger than 4096 MiB"))
    assert "no dump: the dump is larger than 4096 MiB" in vmkit("crashes", "web", "show").out


def test_crash_of_a_program_is_shown_with_its_command(vmkit: Vmkit, root: Path) -> None:
    folder = keep(root, "web", Crash(CrashKind.CORE, 1.0, "web was ended", trouble="half of it", program=PROGRAM))
    (folder / "core").write_bytes(b"x" * 4096)
    assert vmkit("crashes").out.splitlines()[1].split()[-4:] == ["core", "web", "was", "ended"]
    shown = vmkit("crashes", "web", "show").out
    assert "program: /usr/bin/web (deleted)" in shown
    assert "command: web --name 'two words'" in shown
    assert "user:    uid 1000, gid 100, in a container" in shown
    assert "missing: half of it" in shown
    assert f"core:    {folder}/core" in shown
    assert "gdb:     vmkit crashes web gdb 1" in shown


def test_failed_service_is_shown_with_its_log_and_has_no_core(vmkit: Vmkit, root: Path) -> None:
    keep(root, "web", Crash(CrashKind.SERVICE, 1.0, "web.service failed", service=SERVICE))
    assert vmkit("crashes").out.splitlines()[1].split()[-4:] == ["MiB", "-", "web.service", "failed"]
    shown = vmkit("crashes", "web", "show").out
    assert "service: web.service" in shown
    assert "result:  exit-code, after 4 restarts, and systemd starts it again" in shown
    assert "main:    pid 41 exited with 3" in shown
    assert f"run:     {'01' * 16}" in shown
    assert shown.endswith("\n\nlast words\nFailed with result\n")
    done = vmkit("crashes", "web", "gdb")
    assert "crash 1 of 'web' is a service that failed, and left no core" in done.err
    assert "vmkit crashes web show 1" in done.err
    value = json.loads(vmkit("crashes", "web", "show", "--json").out)
    check_form("crash", value)
    assert value["crash"]["service"]["log"] == ["last words", "Failed with result"]
    assert vmkit("crashes", "web", "rm", "1").out == "crash 1 of web is removed\n"


def test_core_that_made_a_service_fail_names_it(vmkit: Vmkit, root: Path) -> None:
    service = replace(SERVICE, end=ServiceEnd.DUMPED, status=11, is_restarted=False, log=())
    folder = keep(root, "web", Crash(CrashKind.CORE, 1.0, "web was ended", program=PROGRAM, service=service))
    shown = vmkit("crashes", "web", "show").out
    assert f"core:    {folder}/core" in shown
    assert "main:    pid 41 was ended by signal 11, with a core" in shown
    assert "log:     the host has no lines of it" in shown


def test_text_of_a_guest_cannot_steer_the_terminal(vmkit: Vmkit, root: Path) -> None:
    text = HOSTILE.decode(errors="replace")
    folder = keep(root, "web", Crash(CrashKind.PANIC, 1.0, text, kernel=text, dump=DumpFormat.ELF, trouble=text))
    (folder / DMESG).write_bytes(HOSTILE)
    program = replace(PROGRAM, name=text, command=(text, text), exe=text, cgroup=text)
    keep(root, "web", Crash(CrashKind.CORE, 2.0, text, trouble=text, program=program))
    service = replace(SERVICE, unit=text, result=text, log=(text,))
    keep(root, "web", Crash(CrashKind.SERVICE, 3.0, text, service=service))
    for words in (("crashes",), *(("crashes", "web", "show", number) for number in "123")):
        assert "\x1b" not in vmkit(*words).out
        assert "\x9b" not in vmkit(*words).out


def test_rm_removes_what_is_named_and_nothing_for_a_wrong_number(vmkit: Vmkit, root: Path) -> None:
    for _ in range(3):
        keep(root, "web")
    done = vmkit("crashes", "web", "rm", "1", "7")
    assert (done.status, done.err.splitlines()[0]) == (64, "vmkit: 'web' has no crash 7")
    assert len(vmkit("crashes", "web").out.splitlines()) == 4
    assert vmkit("crashes", "web", "rm", "1", "3").out == "crash 1 of web is removed\ncrash 3 of web is removed\n"
    assert vmkit("crashes", "web").out.splitlines()[1].split()[1] == "2"
    assert "rm needs the number of a crash" in vmkit("crashes", "web", "rm").err


def test_crashes_in_json_are_for_programs(vmkit: Vmkit, root: Path) -> None:
    keep(root, "web", CRASH)
    (keep(root, "web") / "crash.json").write_text("{")
    value = json.loads(vmkit("crashes", "--json").out)
    check_form("crashes", value)
    assert [(one["machine"], one["number"], one["crash"] is None) for one in value] == [
        ("web", 1, False),
        ("web", 2, True),
    ]
    one = json.loads(vmkit("crashes", "web", "show", "1", "--json").out)
    check_form("crash", one)
    assert one["crash"]["brief"] == CRASH.brief
