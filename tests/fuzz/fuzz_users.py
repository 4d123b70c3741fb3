"""Fuzzes the reading of passwd and group: any bytes are survived, and a plain reading of every line finds the same.

Longer than under pytest: python -m tests.fuzz.fuzz_users --cases 1000000 --seed 1
"""

import random

from tests.fuzz.seeded import run_program
from vshd.session import users

NAMES = (b"root", b"ann", b"bob")
NUMBERS = (b"0", b"1", b"10", b"4294967294")
WORDS = (*NAMES, *NUMBERS, *NUMBERS, b"x", b"4294967295", b"00", b"-1", b"", b"/bin/sh")
JOINTS = (b":", b":", b":", b":", b":", b"\n", b"\n", b",", b"\0", b"+", b"#", b" ", b"\r", b"::", b"\xff")


def make_file(rng: random.Random) -> bytes:
    """Lines that are nearly right, and some that are."""
    pieces = []
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.5:
            fields = [rng.choice(NAMES), *(rng.choice(WORDS) for _ in range(rng.choice((2, 3, 6, 6, 7))))]
            fields[2] = rng.choice(NUMBERS)
            pieces.append(b":".join(fields) + rng.choice((b"\n", b"\n", b"")))
        else:
            pieces.append(b"".join(rng.choice(WORDS) + rng.choice(JOINTS) for _ in range(rng.randrange(9))))
    return b"".join(pieces)


def run_seeded(rng: random.Random) -> bool:
    """One case. True where the file has a user of the name."""
    data = make_file(rng)
    name = rng.choice((*NAMES, rng.choice((*WORDS, b"ann\nroot", b"ann:x", b"ann,bob"))))
    lines = data.split(b"\n")
    all_users = [user for line in lines if (user := users.parse_user(line)) is not None]
    named = [user.uid for user in all_users if user.name == name]
    found = users.find_user_in(data, name)
    assert (found.uid if found else None) == (named[0] if named else None)
    uid = rng.choice((0, 1, 10, users.ID_MAX))
    numbered = [user.name for user in all_users if user.uid == uid]
    by_number = users.find_uid_in(data, uid)
    assert (by_number.name if by_number else None) == (numbered[0] if numbered else None)
    groups = [group for line in lines if (group := users.parse_group(line)) is not None]
    wanted = [group.gid for group in groups if name in group.members]
    assert users.list_groups_in(data, name, 5) == list(dict.fromkeys([5, *(wanted if users.is_name(name) else [])]))
    for user in all_users:
        # What a session is made of: no word of it can be refused by the kernel for its form.
        assert 0 <= user.uid <= users.ID_MAX
        assert 0 <= user.gid <= users.ID_MAX
        assert not any(byte in user.name + user.home + user.shell for byte in b"\n\0:")
    return found is not None


if __name__ == "__main__":
    run_program(__doc__, "users", "with the user", run_seeded)
