"""Fuzzes the reading of vsock_guest_exec's commands: good ones come whole, bad ones raise BadCommandError.

Longer than under pytest: python -m tests.fuzz.fuzz_commands --cases 1000000 --seed 1
"""

import random

from tests.fuzz.seeded import run_program
from vshd.wire.commands import (
    COMMAND_BYTES_MAX,
    LENGTH_BYTES,
    BadCommandError,
    CommandReader,
    encode_command,
    parse_host,
)

SIZES = (1, 2, 100, COMMAND_BYTES_MAX - 1, COMMAND_BYTES_MAX)


def run_seeded(rng: random.Random) -> bool:
    """One case. True where the host's bytes were good to the end."""
    commands = [bytes(rng.randrange(1, 256) for _ in range(rng.choice(SIZES))) for _ in range(rng.randrange(5))]
    data = bytearray(b"".join(encode_command(command, is_persistent=True) for command in commands))
    is_damaged = rng.random() < 0.5
    if is_damaged:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(2)] = bytes([rng.choice((0, 1, 8, 255))])
    parse_host(rng.randbytes(rng.randrange(12)).decode("utf-8", "surrogateescape"))
    reader = CommandReader()
    seen = []
    at = 0
    try:
        while at < len(data):
            size = rng.randrange(1, rng.choice((2, 5000)))
            seen += reader.receive_data(bytes(data[at : at + size]))
            at += size
    except BadCommandError:
        assert is_damaged
        return False
    if not is_damaged:
        assert seen == commands
        assert reader.is_between
    assert all(0 < len(command) <= COMMAND_BYTES_MAX and b"\0" not in command for command in seen)
    assert sum(map(len, seen)) + LENGTH_BYTES * len(seen) <= len(data)
    return True


if __name__ == "__main__":
    run_program(__doc__, "commands", "good to the end", run_seeded)
