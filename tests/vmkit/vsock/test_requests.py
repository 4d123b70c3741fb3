"""Requests of the control socket: every request survives its line, and no line breaks the parser."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from vmkit.vsock.faults import FaultTable
from vmkit.vsock.requests import (
    DIRECTIONS,
    MAX_COUNT,
    MAX_DELAY_MS,
    MAX_LINE_BYTES,
    MAX_PORTS,
    MAX_SNAPLEN_BYTES,
    REFUSE,
    Clear,
    Fault,
    Kill,
    ListFaults,
    Request,
    RequestError,
    TraceRequest,
    parse_request,
    render_request,
)

PORTS = st.lists(st.integers(0, 2**32 - 1), max_size=MAX_PORTS).map(tuple)
DIRECTION = st.sampled_from(("", *DIRECTIONS))
COUNT = st.integers(0, MAX_COUNT)
NEVER = st.just(-1)
ZERO = st.just(0)


def faults(
    kinds: tuple[str, ...],
    *,
    directions: st.SearchStrategy[str] = DIRECTION,
    delay_ms: st.SearchStrategy[int] = ZERO,
    bytes_s: st.SearchStrategy[int] = ZERO,
    after: st.SearchStrategy[int] = NEVER,
) -> st.SearchStrategy[Fault]:
    return st.builds(Fault, st.sampled_from(kinds), PORTS, directions, delay_ms, bytes_s, after, COUNT, COUNT, COUNT)


FAULTS = st.one_of(
    faults(("refuse",)),
    faults(("delay",), delay_ms=st.integers(1, MAX_DELAY_MS)),
    faults(("rate",), bytes_s=st.integers(1, MAX_COUNT)),
    faults(("half-close",), directions=st.sampled_from(DIRECTIONS), after=st.one_of(NEVER, COUNT)),
    faults(("reset", "freeze-credit"), after=st.one_of(NEVER, COUNT)),
)
REQUESTS = st.one_of(
    FAULTS,
    st.builds(TraceRequest, PORTS, PORTS, DIRECTION, st.integers(0, MAX_SNAPLEN_BYTES)),
    st.builds(Clear, COUNT),
    st.just(ListFaults()),
    st.just(Kill()),
)


@given(REQUESTS)
def test_request_survives_its_line(request: Request) -> None:
    line = render_request(request)
    assert len(line) <= MAX_LINE_BYTES
    assert parse_request(line) == request
    assert type(parse_request(line)) is type(request)


@given(st.one_of(st.binary(max_size=80), st.builds(lambda a, b: a + b, st.just(b"fault "), st.binary(max_size=60))))
def test_line_of_any_bytes_is_a_request_or_refused(line: bytes) -> None:
    with contextlib.suppress(RequestError):
        parse_request(line)


@given(st.lists(st.one_of(st.just(0), st.integers(1, 40)), max_size=60))
def test_table_never_uses_a_number_again(turns: list[int]) -> None:
    table = FaultTable()
    seen: set[int] = set()
    for turn in turns:
        if turn:
            table.remove(turn)
        else:
            with contextlib.suppress(RequestError):
                number = table.add(Fault(REFUSE, times=1)).number
                assert number not in seen
                seen.add(number)
    for fault in table.all():
        assert table.hit(fault.number)
    assert not table
