"""Crashes of a real guest: the kernel's panic, with a dump that has its registers, its note and its memory."""

import json
import struct
from pathlib import Path

from tests.guest.conftest import Run, run_program

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


def test_panic_of_a_guest_is_kept_with_its_memory(up: Run, vmkit: Run) -> None:
    assert up("--name", "fragile", "-q", "--vmcore").returncode == 0
    # The session ends with the machine.
    run_program("vsh", "--vm_name", "fragile", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    # It waits for the end, or prints that of the machine that ended.
    done = vmkit("wait", "fragile")
    assert b"the guest's kernel panicked: sysrq triggered crash" in done.stdout + done.stderr
    (one,) = json.loads(vmkit("crashes", "fragile", "--json").stdout)
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
