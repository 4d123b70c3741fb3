"""Fuzzes what tells of failed services: systemd's D-Bus messages in the guest, and the guest's frames on the host.

Any bytes are messages or an error, at any sizes. Longer than under pytest: python -m tests.fuzz.fuzz_units --cases
1000000 --seed 1
"""

import json
import random
import tempfile
from pathlib import Path

from tests.fuzz.fuzz_lasting import damage
from tests.fuzz.seeded import run_program
from tests.vshd.private_bus import make_answer, make_change, make_signal
from vmkit.crashes.record import Crash, CrashKind, parse_crash, render_crash
from vmkit.monitor.units import describe, make_service, read_lines
from vshd.services.failures import UnitWatch
from vshd.wire import units
from vshd.wire.dbus import BusClient
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.units import UnitFacts, UnitReader, encode

LET_IN = b"OK 0123\r\n"


def make_messages(rng: random.Random) -> bytes:
    """What systemd may send."""
    data = b""
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        if kind == 0:
            data += make_signal("/web_2eservice", "M", "sv", b"x", ("as", [rng.randbytes(3).hex().encode()]))
        elif kind == 1:
            data += make_answer(rng.randrange(4), "a{sv}", {b"ActiveState": ("s", b"failed"), b"b": ("d", 7)})
        else:
            data += make_change(rng.choice("ab"), rng.randrange(1, 200))
    return data


def read_failures(data: bytes, size: int) -> list[bytes] | None:
    watch = UnitWatch()
    watch.begin(0)
    found: list[bytes] = []
    try:
        for at in range(0, len(data), size):
            found += [facts.encode() for facts in watch.receive(data[at : at + size])]
    except RemoteProtocolError:
        return None
    return found


def read_values(data: bytes) -> None:
    """Every message with its arguments, also those that the service does not look at."""
    try:
        for message in BusClient(0).receive(data):
            message.read()
    except RemoteProtocolError:
        pass


def make_frames(rng: random.Random) -> bytes:
    """What a guest may send."""
    data = b""
    for _ in range(rng.randrange(1, 4)):
        facts = UnitFacts()
        facts.unit, facts.result, facts.invocation = (rng.randbytes(rng.choice((0, 9, 300))) for _ in range(3))
        facts.code, facts.status, facts.pid = rng.randrange(5), rng.getrandbits(32), rng.getrandbits(32)
        facts.time_s, facts.is_restarted = rng.getrandbits(64), rng.random() < 0.5
        data += encode(units.FAILED, facts.encode())
        if rng.random() < 0.2:
            data += encode(units.LOST, rng.randbytes(4))
    return data


def read_frames(data: bytes, size: int) -> list[bytes | int] | None:
    reader, found = UnitReader(), []
    try:
        for at in range(0, len(data), size):
            for value in reader.feed(data[at : at + size]):
                found.append(value if isinstance(value, int) else value.encode())
                if isinstance(value, UnitFacts):
                    check_record(value)
    except RemoteProtocolError:
        return None
    return found


def check_record(facts: UnitFacts) -> None:
    """Whatever the facts are, the record of them can be read again."""
    service = make_service(facts)
    crash = Crash(CrashKind.SERVICE, 1.0, describe(service), service=service)
    assert parse_crash(json.loads(json.dumps(render_crash(crash)))).service == service


def run_seeded(rng: random.Random) -> bool:
    """One case; whether both streams were good ones. Raises whatever a case may not."""
    sent = LET_IN + damage(rng, make_messages(rng))
    whole = read_failures(sent, len(sent))
    pieces = read_failures(sent, rng.randrange(1, 200))
    # A message that is refused hides those before it, which came with it.
    assert (whole is None) == (pieces is None)
    assert whole is None or whole == pieces
    read_values(sent)
    frames = damage(rng, make_frames(rng))
    found = read_frames(frames, max(1, len(frames)))
    assert read_frames(frames, rng.randrange(1, 50)) == found
    if rng.random() < 0.02:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            path.write_bytes(damage(rng, b'{"unit": "a.service", "time": 1.5, "pid": 1, "uid": 0, "text": "x"}\n' * 3))
            facts = UnitFacts()
            facts.unit = b"a.service"
            assert len(read_lines(path, facts)[0]) <= 4
    return whole is not None and found is not None


if __name__ == "__main__":
    run_program(__doc__, "units", "whole", run_seeded)
