"""Fuzzes the reading of a kernel's BTF: any bytes give functions that are there, or a BtfError, and in time.

Longer than under pytest: python -m tests.fuzz.fuzz_btf --cases 1000000 --seed 1
"""

import random
import struct

from tests.fuzz.seeded import run_program
from tests.vmkit.image.wall.btf_maker import BtfMaker, make_kernel_btf
from vmkit.image.wall.btf import BtfError, find_functions, parse_btf

NAMES = ("bpf_lsm_socket_connect", "bpf_lsm_socket_bind")
LENGTH_LIMIT = 400


def make_case(rng: random.Random) -> bytes:
    """Good BTF with some damage, types at random, or noise."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(LENGTH_LIMIT))
    if kind == 1:
        maker = BtfMaker()
        for _ in range(rng.randrange(12)):
            maker.add(rng.randrange(1, 20), rng.choice(("", "x", *NAMES)))
        data = bytearray(maker.render())
    else:
        data = bytearray(make_kernel_btf())
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            # Sizes and offsets are words: large ones are the interesting ones.
            word = struct.pack("<I", rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32))))
            data[at & ~3 : (at & ~3) + 4] = word
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.2 else bytes(data)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it gave both functions. Raises whatever a case may not."""
    return run_case(make_case(rng))


def run_case(data: bytes) -> bool:
    try:
        functions = find_functions(parse_btf(data), NAMES)
    except BtfError:
        return False
    for name, function in functions.items():
        assert function.type_id > 0
        assert function.text.data == name.encode() + b"\0"
        for mark in (function.record, function.text):
            assert data[mark.offset : mark.offset + len(mark.data)] == mark.data
    return True


if __name__ == "__main__":
    run_program(__doc__, "btf", "whole", run_seeded)
