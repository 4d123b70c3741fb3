"""Fuzzes what answers a guest whose virtiofsd has ended: any ring gives answers or stands still.

Longer than under pytest: python -m tests.fuzz.fuzz_share_rings --cases 1000000 --seed 1
"""

import random
import struct

from tests.fuzz.seeded import run_program
from tests.vmkit.vsock.test_vring import AVAIL, DATA, DESC, GUEST_BASE, INDIRECT, NEXT, RAM, SIZE, TABLE, WRITE, Arena
from vmkit.shares.rings import FailingRing
from vmkit.vsock.vring import RingError

FLAGS = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFFF)
PLACES = (GUEST_BASE + DATA, GUEST_BASE + TABLE, GUEST_BASE + DESC, GUEST_BASE + RAM - 8, 0, 1 << 40, (1 << 64) - 1)
LENGTHS = (0, 1, 8, 15, 16, 40, 48, 64, 4096, RAM, (1 << 32) - 1)
TURNS = 4


def make_descriptor(rng: random.Random) -> bytes:
    """One that a driver could write, mostly."""
    place = rng.choice(PLACES) if rng.random() < 0.2 else PLACES[0]
    return struct.pack("<QIHH", place, rng.choice(LENGTHS), rng.choice(FLAGS), rng.randrange(SIZE + 2))


def run_seeded(rng: random.Random) -> bool:
    """One case; True when a request had an answer."""
    arena = Arena(has_event_idx=rng.random() < 0.5)
    ring = FailingRing(arena.memory, arena.layout)
    try:
        for _ in range(TURNS):
            for place in (DESC, TABLE):
                arena.write(place, b"".join(make_descriptor(rng) for _ in range(SIZE)))
            if rng.random() < 0.1:
                arena.write(AVAIL, rng.randbytes(6 + 2 * SIZE))
            arena.offer(*(rng.randrange(SIZE + (rng.random() < 0.1)) for _ in range(rng.randrange(SIZE))))
            while ring.work():
                pass
        return ring.base > 0
    except RingError:
        return ring.base > 0
    finally:
        arena.close()


if __name__ == "__main__":
    run_program(__doc__, "share rings", "with answers", run_seeded)
