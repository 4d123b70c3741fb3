"""What ChromeOS's own programs said to each other, as captured: (who, frame), the arguments, and how it ended."""

# ruff: noqa: E501  (frames are kept as they were captured)


def _frames(text: str) -> list[tuple[str, bytes]]:
    return [(line.split()[0], bytes.fromhex(line.split(maxsplit=1)[1])) for line in text.strip().splitlines()]


ECHO = _frames("""
C>S 2c 00 00 00 0a 09 2f 76 6d 5f 73 68 65 6c 6c 12 04 72 6f 6f 74 1a 0d 0a 04 54 45 52 4d 12 05 78 74 65 72 6d 2a 04 65 63 68 6f 2a 02 68 69 40 01
S>C 10 00 00 00 08 01 12 09 76 73 68 20 72 65 61 64 79 18 ec 1e
C>S 04 00 00 00 0a 02 08 01
S>C 09 00 00 00 0a 07 08 02 12 03 68 69 0a
S>C 04 00 00 00 0a 02 08 03
S>C 04 00 00 00 0a 02 08 02
S>C 1f 00 00 00 12 1d 08 02 12 19 74 61 72 67 65 74 20 70 72 6f 63 65 73 73 20 68 61 73 20 65 78 69 74 65 64
""")
CAT = _frames("""
C>S 27 00 00 00 0a 09 2f 76 6d 5f 73 68 65 6c 6c 12 04 72 6f 6f 74 1a 0d 0a 04 54 45 52 4d 12 05 78 74 65 72 6d 2a 03 63 61 74 40 01
S>C 10 00 00 00 08 01 12 09 76 73 68 20 72 65 61 64 79 18 f1 1e
C>S 09 00 00 00 0a 07 08 01 12 03 68 69 0a
C>S 04 00 00 00 0a 02 08 01
S>C 09 00 00 00 0a 07 08 02 12 03 68 69 0a
S>C 04 00 00 00 0a 02 08 03
S>C 1f 00 00 00 12 1d 08 02 12 19 74 61 72 67 65 74 20 70 72 6f 63 65 73 73 20 68 61 73 20 65 78 69 74 65 64
""")
OUT_ERR = _frames("""
C>S 4a 00 00 00 0a 09 2f 76 6d 5f 73 68 65 6c 6c 12 04 72 6f 6f 74 1a 0d 0a 04 54 45 52 4d 12 05 78 74 65 72 6d 2a 02 73 68 2a 02 2d 63 2a 1e 65 63 68 6f 20 6f 75 74 3b 20 65 63 68 6f 20 65 72 72 20 3e 26 32 3b 20 65 78 69 74 20 37 40 01
S>C 10 00 00 00 08 01 12 09 76 73 68 20 72 65 61 64 79 18 f6 1e
C>S 04 00 00 00 0a 02 08 01
S>C 0a 00 00 00 0a 08 08 02 12 04 6f 75 74 0a
S>C 0a 00 00 00 0a 08 08 03 12 04 65 72 72 0a
S>C 21 00 00 00 12 1f 08 02 12 19 74 61 72 67 65 74 20 70 72 6f 63 65 73 73 20 68 61 73 20 65 78 69 74 65 64 18 0e
""")
KILLED = _frames("""
C>S 42 00 00 00 0a 09 2f 76 6d 5f 73 68 65 6c 6c 12 04 72 6f 6f 74 1a 0d 0a 04 54 45 52 4d 12 05 78 74 65 72 6d 1a 0a 0a 03 46 4f 4f 12 03 62 61 72 2a 02 73 68 2a 02 2d 63 2a 0a 6b 69 6c 6c 20 2d 39 20 24 24 40 01
S>C 10 00 00 00 08 01 12 09 76 73 68 20 72 65 61 64 79 18 a4 1f
C>S 04 00 00 00 0a 02 08 01
S>C 04 00 00 00 0a 02 08 02
S>C 04 00 00 00 0a 02 08 03
S>C 21 00 00 00 12 1f 08 02 12 19 74 61 72 67 65 74 20 70 72 6f 63 65 73 73 20 68 61 73 20 65 78 69 74 65 64 18 12
""")

# name: (frames, environment, argv, pid, what the client said, what the server said, exit code)
SESSIONS = {
    "echo": (ECHO, {}, [b"echo", b"hi"], 3948, [b""], [(2, b"hi\n"), (3, b""), (2, b"")], 0),
    "cat": (CAT, {}, [b"cat"], 3953, [b"hi\n", b""], [(2, b"hi\n"), (3, b"")], 0),
    "out and err": (
        OUT_ERR,
        {},
        [b"sh", b"-c", b"echo out; echo err >&2; exit 7"],
        3958,
        [b""],
        [(2, b"out\n"), (3, b"err\n")],
        7,
    ),
    "killed": (KILLED, {b"FOO": b"bar"}, [b"sh", b"-c", b"kill -9 $$"], 4004, [b""], [(2, b""), (3, b"")], 9),
}


def said_by(frames: list[tuple[str, bytes]], who: str) -> bytes:
    """All bytes of one side."""
    return b"".join(frame for speaker, frame in frames if speaker == who)
