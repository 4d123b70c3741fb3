"""Fuzzes the server's side of SOCKS 5: any bytes of a client give one end within limits, the same in any pieces.

Longer than under pytest: python -m tests.fuzz.fuzz_socks --cases 1000000 --seed 1
"""

import random
from collections.abc import Sequence

from tests.fuzz.seeded import run_program
from vsh.forward.socks import SocksError, SocksServer
from vshd.carry.endpoints import PlaceError, find_fixed

# What a client may say: whole messages, and their parts.
PIECES = (
    *(b"\x05\x01\x00", b"\x05\x02\x02\x00", b"\x05\x01\x02", b"\x05\x00", b"\x04\x01\x00\x50", b"GET / HTTP/1.1\r\n"),
    *(b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x1f\x90"),
    *(b"\x05\x01\x00\x03\x09localhost\x00\x50", b"\x05\x01\x00\x03\x02::\x00\x50", b"\x05\x01\x00\x03\x00\x00\x50"),
    *(b"\x05\x02\x00\x01", b"\x05\x03\x00\x01", b"\x05\x01\x00\x02", b"\x05\x01\x00\x03\xff", b"\x00", b"\xff", b"*"),
)
# A greeting with all methods and a request with the longest name, and nothing behind them.
HELD_MAX = 2 + 255 + 4 + 1 + 255 + 2

# What a client was answered, where it is brought, what it said behind that, and why not.
Outcome = tuple[bytes, str, bytes, str]


def serve(data: bytes, cuts: Sequence[int]) -> Outcome:
    socks = SocksServer()
    answer = b""
    start = 0
    try:
        for cut in (*sorted(cuts), len(data)):
            answer += socks.receive_data(data[start:cut])
            start = cut
            assert socks.target or len(socks._data) <= HELD_MAX
    except SocksError as error:
        assert not socks.target
        return answer + error.answer, "", b"", error.brief
    return answer, socks.target, socks.rest, ""


def check_client(data: bytes, cuts: Sequence[int]) -> bool:
    """Raises AssertionError for what no client may do. Returns whether it is brought somewhere."""
    outcome = serve(data, ())
    assert serve(data, cuts) == outcome
    _, target, rest, _ = outcome
    if not target:
        return False
    assert data.endswith(rest)
    host = target.removeprefix("tcp:").rpartition(":")[0]
    if host != "localhost":
        # It is a place, and none that means another one here; names are the guest's to find.
        try:
            addresses = find_fixed(target)
        except PlaceError as error:
            assert "cannot find" in str(error), target
        else:
            assert all(address[1] for _, address in addresses)
    return True


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it is brought somewhere. Raises whatever a case may not."""
    pieces = [rng.choice(PIECES[:2])] if rng.random() < 0.8 else []
    pieces += [
        rng.choice(PIECES) if rng.random() < 0.9 else rng.randbytes(rng.randrange(8)) for _ in range(rng.randrange(6))
    ]
    data = b"".join(pieces)
    return check_client(data, [rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))])


if __name__ == "__main__":
    run_program(__doc__, "SOCKS", "brought somewhere", run_seeded)
