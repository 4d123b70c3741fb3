"""Measures the sides of a heat in turns, so that a busy moment hits all, after a round that does not count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from vmkit.bench.series import BYTES_PER_SECOND, SECONDS, Series

# Enough to have gone through every part of a way once.
WARM_UP_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Transfer:
    """A side of a heat of throughput. carry: moves that many bytes and returns the seconds. size_bytes: how many."""

    carry: Callable[[int], float]
    size_bytes: int


def race(heat: str, sides: Mapping[str, Callable[[], float]], rounds: int, *, has_warm_up: bool = True) -> list[Series]:
    """Runs the sides in turns and returns the seconds that each took."""
    values: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(0 if has_warm_up else 1, rounds + 1):
        for side, run in sides.items():
            seconds = run()
            if number:
                values[side].append(seconds)
    return [Series(heat, side, SECONDS, tuple(taken)) for side, taken in values.items()]


def race_transfers(heat: str, sides: Mapping[str, Transfer], rounds: int) -> list[Series]:
    """Returns the throughput of each side: its size by its seconds. First runs a short transfer that does not count."""
    for side in sides.values():
        side.carry(min(WARM_UP_BYTES, side.size_bytes))
    runs = {name: partial(side.carry, side.size_bytes) for name, side in sides.items()}
    series = []
    for taken in race(heat, runs, rounds, has_warm_up=False):
        size = sides[taken.side].size_bytes
        rates = tuple(size / seconds for seconds in taken.values)
        series.append(Series(heat, taken.side, BYTES_PER_SECOND, rates, size_bytes=size))
    return series
