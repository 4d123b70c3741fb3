"""The results of a run of the race: series of figures, with the facts of the run. Values and their JSON files.

A series belongs to a *heat* (one question, asked of several *sides* in turns) and holds one value per round.
"""

import json
import random
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmkit.errors import ConfigError

SCHEMA = 1
MAX_FILE_BYTES = 16 << 20
# Enough that the interval does not move by more than its own width matters.
RESAMPLES = 2000
CONFIDENCE = 0.95

SECONDS, BYTES_PER_SECOND, MIB = "s", "B/s", "MiB"
HIGHER_IS_BETTER = frozenset((BYTES_PER_SECOND,))


@dataclass(frozen=True, slots=True)
class Series:
    """One side of one heat. size_bytes: the size of each transfer; 0: the heat is no throughput."""

    heat: str
    side: str
    unit: str
    values: tuple[float, ...]
    note: str = ""
    size_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles; the extremes where there are fewer than four values."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: facts about machine, guest and programs, and the series in the order of the heats."""

    facts: dict[str, str]
    series: tuple[Series, ...]
    failures: tuple[str, ...] = field(default=())

    def find(self, heat: str, side: str) -> Series | None:
        return next((series for series in self.series if (series.heat, series.side) == (heat, side)), None)


@dataclass(frozen=True, slots=True)
class Aim:
    """A ratio of medians that the project aims at: `side` over `against`, at most or at least `limit`."""

    heat: str
    side: str
    against: str
    limit: float
    is_ceiling: bool
    of_heat: str = ""

    def ratio(self, outcome: Outcome) -> float | None:
        """Returns the ratio; None when one of the two sides was not measured."""
        ours, theirs = outcome.find(self.heat, self.side), outcome.find(self.of_heat or self.heat, self.against)
        return ours.median / theirs.median if ours and theirs and theirs.median else None

    def is_met(self, ratio: float) -> bool:
        return ratio <= self.limit if self.is_ceiling else ratio >= self.limit


def render_outcome(outcome: Outcome) -> str:
    """Returns the outcome as JSON."""
    return json.dumps({"schema": SCHEMA, **asdict(outcome)}, indent=1)


def read_outcome(path: Path) -> Outcome:
    """Reads a file of render_outcome(). Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(MAX_FILE_BYTES))
        if data["schema"] != SCHEMA:
            raise ConfigError(f"{path} is of schema {data['schema']!r}, not {SCHEMA}")
        series = tuple(
            Series(
                str(entry["heat"]),
                str(entry["side"]),
                str(entry["unit"]),
                tuple(map(float, entry["values"])),
                str(entry.get("note", "")),
                int(entry.get("size_bytes", 0)),
            )
            for entry in data["series"]
        )
        facts = {str(name): str(value) for name, value in data["facts"].items()}
        failures = tuple(map(str, data.get("failures", ())))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} holds no figures of `vmkit bench`: {error!r}") from error
    if not all(entry.values for entry in series):
        raise ConfigError(f"{path}: a series without values")
    return Outcome(facts, series, failures)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a side between two runs: the ratio of medians (new over old) and its confidence interval.

    is_repeated: whether both runs measured it more than once; otherwise its noise is unknown.
    """

    heat: str
    side: str
    unit: str
    ratio: float
    low: float
    high: float
    is_repeated: bool = True

    @property
    def is_beyond_noise(self) -> bool:
        return self.is_repeated and not self.low <= 1.0 <= self.high

    @property
    def is_better(self) -> bool:
        return (self.ratio > 1.0) == (self.unit in HIGHER_IS_BETTER)


def compare(old: Outcome, new: Outcome) -> list[Change]:
    """Compares every side that both runs have. The interval is a bootstrap's: it resamples the values."""
    changes = []
    for series in new.series:
        before = old.find(series.heat, series.side)
        if before is None or before.unit != series.unit or before.median <= 0:
            continue
        low, high = _resample(before.values, series.values)
        ratio = series.median / before.median
        is_repeated = min(len(before.values), len(series.values)) > 1
        changes.append(Change(series.heat, series.side, series.unit, ratio, low, high, is_repeated))
    return changes


def find_other_sizes(old: Outcome, new: Outcome) -> list[str]:
    """Returns the heats in which the sizes of transfers differ between the runs."""
    pairs = ((old.find(series.heat, series.side), series) for series in new.series)
    return list(dict.fromkeys(now.heat for before, now in pairs if before and before.size_bytes != now.size_bytes))


def _resample(old: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, float]:
    # The same figures give the same answer.
    rng = random.Random(0)  # noqa: S311 - statistics, no secrets
    ratios = sorted(
        statistics.median(rng.choices(new, k=len(new))) / max(1e-12, statistics.median(rng.choices(old, k=len(old))))
        for _ in range(RESAMPLES)
    )
    cut = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return ratios[cut], ratios[-cut - 1]
