"""Fuzzes maitred's messages: any bytes are a message or INVALID_ARGUMENT, and Google's codec reads the same.

Longer than under pytest: python -m tests.fuzz.fuzz_maitred --cases 1000000 --seed 1
"""

import json
import random

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.fuzz.seeded import run_program
from tests.vmkit.maitred.google import CLASSES
from vmkit.errors import ConfigError
from vmkit.maitred.codec import Codec
from vmkit.maitred.forms import parse_form, render_form
from vmkit.maitred.messages import METHODS

KINDS = sorted(
    {kind for method in METHODS.values() for kind in (method.request, method.response)}, key=lambda kind: kind.__name__
)
CODEC = Codec()
TAGS = [number << 3 | wire for number in range(10) for wire in range(8)]
PIECES = (b"", b"\0", b"\1", b"a", b"\n\1a\x12\1b", b"\xff" * 9 + b"\1", b"\x80" * 12, b"\xff\xff\xff\xff\x0f", b"\xc3")


def make_bytes(rng: random.Random) -> bytes:
    """Fields that are nearly right, and some that are."""
    out = bytearray()
    for _ in range(rng.randrange(8)):
        out.append(rng.choice(TAGS))
        piece = rng.choice(PIECES)
        if rng.random() < 0.6:
            out.append(len(piece) if rng.random() < 0.9 else rng.randrange(256))
        out += piece
    if out and rng.random() < 0.3:
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def run_seeded(rng: random.Random) -> bool:
    """One case. True where the bytes are a message."""
    data, kind = make_bytes(rng), rng.choice(KINDS)
    theirs = CLASSES[kind.__name__]()
    try:
        theirs.ParseFromString(data)
    except DecodeError:
        is_theirs = False
    else:
        is_theirs = True
    try:
        ours = CODEC.decode(data, kind)
    except GRPCError as error:
        assert error.status is Status.INVALID_ARGUMENT
        # Google's codec passes over a field of number 0, which no message can have.
        assert not is_theirs or "field number" in str(error.message), (kind, data)
        return False
    form = render_form(ours)
    json.dumps(form)
    if is_theirs:
        # Google's keeps fields that it does not know, and ours does not.
        theirs.DiscardUnknownFields()
        assert CLASSES[kind.__name__].FromString(ours.encode()) == theirs, (kind, data)
    try:
        parse_form(kind, form)
    except ConfigError:
        # A status that has no name, or an empty sub-message that is null.
        assert any(value is None or isinstance(value, str) for value in form.values()), form
    return True


if __name__ == "__main__":
    run_program(__doc__, "maitred", "messages", run_seeded)
