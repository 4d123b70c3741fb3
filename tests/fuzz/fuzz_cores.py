"""Fuzzes what a guest sends of its core dumps: any bytes are frames in their order or an error, at any sizes.

What is kept stays within its limits. Longer than under pytest: python -m tests.fuzz.fuzz_cores --cases 1000000 --seed 1
"""

import random
import tempfile
from pathlib import Path

from tests.fuzz.fuzz_lasting import damage
from tests.fuzz.seeded import run_program
from vmkit.crashes.store import list_all
from vmkit.machine.launch import CrashPlan
from vmkit.monitor.cores import CoreReceiver
from vshd.wire import cores
from vshd.wire.cores import CoreFacts, CoreReader, encode
from vshd.wire.errors import RemoteProtocolError

KEPT_MAX = 1 << 20


def make_stream(rng: random.Random) -> bytes:
    """Some cores, and what stands between them."""
    stream = b""
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.2:
            stream += encode(cores.LOST, rng.randbytes(4))
        facts = CoreFacts()
        facts.pid, facts.signal = rng.randrange(1 << 32), rng.randrange(70)
        facts.name, facts.command, facts.exe = (rng.randbytes(rng.choice((0, 5, 200))) for _ in range(3))
        facts.is_contained = rng.random() < 0.5
        stream += encode(cores.BEGIN, facts.encode())
        for _ in range(rng.randrange(3)):
            stream += encode(cores.DATA, rng.choice((b"", bytes(5000), rng.randbytes(300))))
            if rng.random() < 0.3:
                stream += cores.encode_hole(rng.getrandbits(rng.choice((8, 33, 64))))
        stream += encode(cores.END, bytes((rng.randrange(3),)))
    return stream


def read(data: bytes, size: int) -> list[tuple[int, bytes | int]] | None:
    """The frames of a stream that comes in pieces; None for one that is refused."""
    reader, frames = CoreReader(), []
    try:
        for at in range(0, len(data), size):
            for kind, value in reader.feed(data[at : at + size]):
                frames.append((kind, value.encode() if isinstance(value, CoreFacts) else value))
    except RemoteProtocolError:
        return None
    return frames


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the stream was a good one. Raises whatever a case may not."""
    stream = damage(rng, make_stream(rng))
    whole = read(stream, max(1, len(stream)))
    assert read(stream, rng.randrange(1, 50)) == whole
    # A folder each is what costs time.
    if rng.random() < 0.05:
        with tempfile.TemporaryDirectory() as folder:
            receiver = CoreReceiver(CrashPlan(Path(folder), KEPT_MAX, cores=True), "m", {}, lambda _name, _data: None)
            try:
                receiver.feed(stream)
            except RemoteProtocolError:
                assert whole is None
            finally:
                receiver.close()
            assert all(kept.crash is not None and kept.measure() < KEPT_MAX for kept in list_all(Path(folder)))
    return whole is not None


if __name__ == "__main__":
    run_program(__doc__, "cores", "whole", run_seeded)
