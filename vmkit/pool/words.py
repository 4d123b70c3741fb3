"""What a client asks of a pool's keeper, as JSON lines over its control socket: one request a connection. Pure.

`{"do": "take"}` is answered with `{"machine": NAME}` as soon as there is one. The machine is the client's when its
monitor has answered the client's own Take; then the client sends TAKEN. A client that closes the connection without it
has left the machine, which the keeper ends. `{"do": "status"}` is answered with
the pool's Status, and `{"do": "stop"}` with `{"machines": [NAME, ...]}`, those that end with the keeper.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

MAX_LINE_BYTES = 64 * 1024
# What a client sends when the machine is its own.
TAKEN = b"\n"


class Verb(StrEnum):
    """What a client can ask for."""

    TAKE = "take"
    STATUS = "status"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Status:
    """A pool at one moment. waiting: machines that can be taken. taken: how many were, since the start.

    error: why the last machine could not be made; empty after one that could.
    """

    name: str
    image: str
    size: int
    waiting: tuple[str, ...]
    taken: int
    error: str


class PoolLineError(Exception):
    """A line is no request or answer; the text is for a person."""


def render_request(verb: Verb) -> bytes:
    """A request as its line."""
    return json.dumps({"do": verb.value}).encode() + b"\n"


def parse_request(line: bytes) -> Verb:
    """The request of a line. Raises PoolLineError."""
    try:
        return Verb(str(_parse(line).get("do")))
    except ValueError as error:
        raise PoolLineError("this line is no request to a pool") from error


def render_answer(**values: object) -> bytes:
    """An answer as its line."""
    return json.dumps(values).encode() + b"\n"


def render_status(status: Status) -> bytes:
    """A status as its line."""
    return render_answer(**asdict(status))


def parse_answer(line: bytes) -> dict[str, object]:
    """The values of an answer. Raises PoolLineError."""
    return _parse(line)


def parse_status(values: dict[str, object]) -> Status:
    """The status in an answer. Raises PoolLineError."""
    waiting = values.get("waiting")
    try:
        return Status(
            name=str(values["name"]),
            image=str(values["image"]),
            size=int(str(values["size"])),
            waiting=tuple(map(str, waiting)) if isinstance(waiting, list) else (),
            taken=int(str(values["taken"])),
            error=str(values["error"]),
        )
    except (KeyError, ValueError) as error:
        raise PoolLineError("the keeper's answer is no status") from error


def _parse(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PoolLineError("a line of the pool's control socket is no JSON") from error
    if not isinstance(value, dict):
        raise PoolLineError("a line of the pool's control socket is no object")
    return value
