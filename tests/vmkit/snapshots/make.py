"""A small snapshot of no machine, for tests of what is done with its files."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmkit.snapshots.key import make_key
from vmkit.snapshots.pages import PAGE_BYTES, save_pages
from vmkit.snapshots.store import MEMORY, SECRET, STATE, Record, open_new, write_record
from vsh.token import make_token_text

STATE_BYTES = b"QEVM" + bytes(60)


def make_snapshot(
    folder: Path, facts: Mapping[str, Any], *, memory_mib: int = 64, options: Mapping[str, Any] | None = None
) -> Path:
    """A snapshot in a folder: the pages 3 and 4 of its memory are not zero."""
    folder.mkdir(mode=0o700, parents=True)
    memory = os.memfd_create("memory")
    os.ftruncate(memory, memory_mib << 20)
    os.pwrite(memory, b"three and four" * 400, 3 * PAGE_BYTES)
    with open_new(folder / MEMORY) as file:
        runs = save_pages(memory, memory_mib << 20, file.fileno())
    os.close(memory)
    for name, data in ((STATE, STATE_BYTES), (SECRET, make_token_text())):
        with open_new(folder / name) as file:
            file.write(data)
    record = Record(
        key=make_key(facts),
        image="tiny",
        facts=facts,
        memory_mib=memory_mib,
        made=time.time(),
        state_bytes=len(STATE_BYTES),
        state_sha256=hashlib.sha256(STATE_BYTES).hexdigest(),
        runs=tuple(runs),
        options=options or {},
    )
    write_record(folder, record)
    return folder
