"""Fuzzes the notes of a core dump: any file gives names within the limits, or a MachineError.

Longer than under pytest: python -m tests.fuzz.fuzz_notes --cases 1000000 --seed 1
"""

import io
import random
import struct
from collections.abc import Sequence

from tests.fuzz.fuzz_lasting import damage
from tests.fuzz.seeded import run_program
from vmkit.crashes.notes import MAX_FILES, MAX_NAME_BYTES, read_mapped
from vmkit.errors import MachineError

HEAD = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
NOTE = struct.Struct("<III")
ET_CORE, EM_X86_64, PT_LOAD, PT_NOTE = 4, 62, 1, 4
NT_PRSTATUS, NT_FILE = 1, 0x46494C45


def make_note(kind: int, text: bytes) -> bytes:
    return NOTE.pack(5, len(text), kind) + b"CORE\0\0\0\0" + text + bytes(-len(text) % 4)


def make_core(names: Sequence[bytes]) -> bytes:
    """A core that names these files, and has no memory."""
    places = b"".join(struct.pack("<3Q", at << 12, (at + 1) << 12, 0) for at in range(len(names)))
    text = struct.pack("<2Q", len(names), 4096) + places + b"".join(name + b"\0" for name in names)
    notes = make_note(NT_PRSTATUS, bytes(336)) + make_note(NT_FILE, text)
    at = HEAD.size + 2 * SEGMENT.size
    head = HEAD.pack(
        b"\x7fELF\x02\x01\x01", ET_CORE, EM_X86_64, 1, 0, HEAD.size, 0, 0, HEAD.size, SEGMENT.size, 2, 0, 0, 0
    )
    segments = SEGMENT.pack(PT_LOAD, 4, 0, 4096, 0, 0, 4096, 4096)
    segments += SEGMENT.pack(PT_NOTE, 0, at, 0, 0, len(notes), 0, 4)
    return head + segments + notes


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the core was a good one. Raises whatever a case may not."""
    names = [bytes(rng.choices(b"/abc.\xff", k=rng.randrange(1, 40))) for _ in range(rng.randrange(5))]
    core = make_core(names)
    damaged = damage(rng, core)
    try:
        found = read_mapped(io.BytesIO(damaged))
    except MachineError:
        assert damaged != core
        return False
    assert len(found) <= MAX_FILES
    assert all(len(name) <= MAX_NAME_BYTES for name in found)
    if damaged == core:
        assert found == list(dict.fromkeys(names))
    return True


if __name__ == "__main__":
    run_program(__doc__, "notes", "good", run_seeded)
