"""Crashes of a real guest, each in a machine that has both: a user's program, and the kernel's panic.

The core comes while the guest runs. The dump of a panic has its registers, its note and its memory.
"""

import json
import struct
import time
from pathlib import Path
from typing import Any

from tests.guest.conftest import DEADLINE_S, Run, run_program

# elf.h: ET_CORE, EM_X86_64, PT_NOTE, NT_PRSTATUS.
ET_CORE, EM_X86_64, PT_NOTE, NT_PRSTATUS = 4, 62, 4, 1
MIB = 1 << 20


def read_notes(dump: Path) -> dict[tuple[bytes, int], bytes]:
    """The notes of an ELF core, by name and type."""
    with dump.open("rb") as file:
        head = file.read(64)
        kind, machine = struct.unpack_from("<HH", head, 16)
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        assert (head[:4], kind, machine) == (b"\x7fELF", ET_CORE, EM_X86_64)
        notes = {}
        for number in range(count):
            file.seek(table + number * size)
            (type_, _, place, _, _, length, _, _) = struct.unpack("<IIQQQQQQ", file.read(56))
            if type_ != PT_NOTE:
                continue
            file.seek(place)
            data, at = file.read(length), 0
            while at + 12 <= len(data):
                name_bytes, text_bytes, note_type = struct.unpack_from("<III", data, at)
                name_at, text_at = at + 12, at + 12 + (name_bytes + 3) // 4 * 4
                notes[data[name_at : name_at + name_bytes].rstrip(b"\0"), note_type] = data[text_at:][:text_bytes]
                at = text_at + (text_bytes + 3) // 4 * 4
        return notes


# A user's program with 40 MB of data that no page of zeros is in.
ABORT = "import os; data = os.urandom(4096) * 10240; os.abort()"
# The kernel writes the core to what no user can open: neither of these sends one.
FORGE = "echo 1 0 0 0 6 7 > /run/vshd.cores/calls; echo x > /proc/sys/kernel/core_pattern"
# The service alone has the FIFO open for good.
KILL = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        continue
    if "/run/vshd.cores/calls" in files:
        os.kill(int(pid), 9)
        print("killed")
"""


def read_crashes(name: str) -> list[dict[str, Any]]:
    """The crashes, without a look at the order in which two came."""
    found = json.loads(run_program("vmkit", "crashes", name, "--json").stdout)
    assert isinstance(found, list)
    return found


def await_crashes(name: str, count: int) -> list[dict[str, Any]]:
    """The first so many crashes of a machine: they come while it runs."""
    end_s = time.monotonic() + DEADLINE_S
    while len(found := read_crashes(name)) < count:
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
    return found


def await_collection(count: int) -> None:
    """Until the guest has begun to give its cores so many times."""
    end_s = time.monotonic() + DEADLINE_S
    while run_program("vmkit", "logs", "fragile", "--kind", "events").stdout.count(b'"event": "cores"') < count:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def check_cores() -> None:
    await_collection(1)
    user = ("vsh", "--vm_name", "fragile", "--user", "user", "--")
    aborted = run_program(*user, "python3", "-ISBc", ABORT, "a word")
    assert aborted.returncode == 128 + 6
    (one,) = await_crashes("fragile", 1)
    crash = one["crash"]
    program = crash["program"]
    assert (crash["kind"], crash["trouble"]) == ("core", "")
    assert (program["uid"], program["signal"], program["contained"]) == (1000, 6, False)
    assert program["command"][-1] == "a word"
    core = Path(one["folder"]) / "core"
    assert core.stat().st_size > 40_000_000
    assert read_notes(core)[b"CORE", NT_PRSTATUS]
    assert "python3" in (Path(one["folder"]) / "maps").read_text()
    # gdb finds the functions of the program and of a library by the image's files.
    trace = run_program("vmkit", "crashes", "fragile", "gdb")
    assert b"Py_RunMain ()" in trace.stdout, trace
    assert b"abort () from" in trace.stdout
    forged = run_program(*user, "sh", "-c", FORGE)
    assert forged.stderr.count(b"ermission denied") == 2, forged.stderr
    assert len(read_crashes("fragile")) == 1
    # After a service that was killed the monitor asks for another.
    root = ("vsh", "--vm_name", "fragile", "--")
    assert run_program(*root, "python3", "-ISBc", KILL).stdout == b"killed\n"
    await_collection(2)
    assert run_program(*root, "sh", "-c", "kill -SEGV $$").returncode == 128 + 11
    other = await_crashes("fragile", 2)[1]
    assert (other["crash"]["program"]["uid"], other["crash"]["program"]["signal"]) == (0, 11)
    # A guest without systemd has no services, and no event about that.
    assert b"services" not in run_program("vmkit", "logs", "fragile", "--kind", "events").stdout
    run_program("vmkit", "crashes", "fragile", "rm", "1", "2")


def test_crashes_of_a_guest_are_kept(up: Run, vmkit: Run) -> None:
    assert up("--name", "fragile", "-q", "--vmcore", "--cores").returncode == 0
    check_cores()
    # The session ends with the machine.
    run_program("vsh", "--vm_name", "fragile", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    # It waits for the end, or prints that of the machine that ended.
    done = vmkit("wait", "fragile")
    assert b"the guest's kernel panicked: sysrq triggered crash" in done.stdout + done.stderr
    (one,) = read_crashes("fragile")
    crash = one["crash"]
    assert (crash["kind"], crash["dump"], crash["trouble"]) == ("panic", "elf", "")
    assert crash["kernel"].startswith("6.12.")
    dump = Path(one["folder"]) / "vmcore"
    assert dump.stat().st_size == crash["dump_bytes"] > 256 * MIB
    # Pages that the guest never had are holes.
    assert dump.stat().st_blocks * 512 < 200 * MIB
    notes = read_notes(dump)
    assert notes[b"CORE", NT_PRSTATUS]
    assert f"OSRELEASE={crash['kernel']}\n".encode() in notes[b"VMCOREINFO", 0]
    shown = vmkit("crashes", "fragile", "show").stdout.decode()
    assert f"drgn -c {dump} -s /usr/lib/debug/boot/vmlinux-{crash['kernel']}" in shown
    assert "Kernel panic - not syncing: sysrq triggered crash" in shown
    assert vmkit("crashes", "fragile", "rm", "1").returncode == 0
    assert not dump.exists()
