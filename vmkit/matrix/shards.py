"""Which cells one job of an engine runs: one by its number, or a share of all. Pure.

Every job plans alone, and all jobs of a run must plan the same: by the same file, and by the same times where times
count. Then each cell is in exactly one shard.
"""

import heapq
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmkit.errors import ConfigError

AUTO = "auto"
# As many as cells.
MAX_SHARDS = 100_000
_SHARD = re.compile(r"(auto|\d{1,6})/(\d{1,6})")
_FORMS = "give it as I/COUNT, such as 2/8, or as auto or auto/COUNT"


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shares, from 1 on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class ArrayEngine:
    """How an engine numbers the jobs of an array. lowest: the first job's number, or the variable that has it."""

    name: str
    index: str
    lowest: int | str
    count: str | None = None


# Kubernetes tells a pod no count: an Indexed Job has an index for each cell, or --shard names the count.
ENGINES = (
    ArrayEngine("Kubernetes", "JOB_COMPLETION_INDEX", 0),
    ArrayEngine("Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ArrayEngine("GitLab", "CI_NODE_INDEX", 1, "CI_NODE_TOTAL"),
    ArrayEngine("Buildkite", "BUILDKITE_PARALLEL_JOB", 0, "BUILDKITE_PARALLEL_JOB_COUNT"),
)


def parse_shard(text: str, environ: Mapping[str, str], cells: int) -> Shard:
    """Returns the shard that `--shard` names. cells: how many there are. Raises ConfigError."""
    if text == AUTO:
        return _find_auto(environ, None, cells)
    found = _SHARD.fullmatch(text)
    if found is None:
        raise ConfigError(f"--shard cannot be '{text}'", hint=_FORMS)
    count = int(found[2])
    if not 1 <= count <= MAX_SHARDS:
        raise ConfigError(f"--shard {text}: the count must be between 1 and {MAX_SHARDS}")
    if found[1] == AUTO:
        return _find_auto(environ, count, cells)
    return _check(Shard(int(found[1]), count), f"--shard {text}", 1)


def _find_auto(environ: Mapping[str, str], count: int | None, cells: int) -> Shard:
    found = [engine for engine in ENGINES if environ.get(engine.index)]
    if not found:
        known = ", ".join(engine.index for engine in ENGINES)
        raise ConfigError("--shard auto: no variable of an engine has a number for this job", hint=f"known: {known}")
    if len(found) > 1:
        names = " and ".join(engine.index for engine in found)
        raise ConfigError(f"--shard auto: both {names} have a number for this job", hint="name it: --shard I/COUNT")
    engine = found[0]
    index = _read(environ, engine.index)
    if count is not None:
        # The count is that of all jobs, and an engine may run some of them again.
        lowest = engine.lowest if isinstance(engine.lowest, int) else 0
    else:
        lowest = engine.lowest if isinstance(engine.lowest, int) else _read(environ, engine.lowest)
        count = cells if engine.count is None else _read(environ, engine.count)
    return _check(Shard(index - lowest + 1, count), f"{engine.index}={index}", lowest)


def _check(shard: Shard, what: str, lowest: int) -> Shard:
    """Raises ConfigError for a shard that does not exist. lowest: what the first one is called there."""
    if not 1 <= shard.index <= shard.count:
        raise ConfigError(f"{what}: the number must be between {lowest} and {lowest + shard.count - 1}")
    return shard


def _read(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not (value.isascii() and value.isdecimal() and len(value) < 7):
        raise ConfigError(f"--shard auto: {name} must be a number, not '{value}'", hint="name it: --shard I/COUNT")
    return int(value)


def plan_shards(names: Sequence[str], count: int, times: Mapping[str, float]) -> list[list[int]]:
    """Shares the cells out: returns the numbers of each shard's cells, in the order of the cells.

    times: seconds of cells in an earlier run, by their names. Without any, cells are dealt in turns. Otherwise the
    longest cell goes first, to the shard that has the least. A new cell counts as the median of the known ones.
    """
    shards: list[list[int]] = [[] for _ in range(count)]
    known = [seconds for name in names if (seconds := times.get(name)) is not None]
    if not known:
        for number in range(len(names)):
            shards[number % count].append(number)
        return shards
    usual = statistics.median(known)
    loads = [times.get(name, usual) for name in names]
    heap = [(0.0, index) for index in range(count)]
    for number in sorted(range(len(names)), key=lambda number: (-loads[number], number)):
        load, index = heap[0]
        shards[index].append(number)
        heapq.heapreplace(heap, (load + loads[number], index))
    return [sorted(shard) for shard in shards]


def pick_number(number: int, cells: int) -> list[int]:
    """Returns the cell that `--cell` names. Raises ConfigError for one that the matrix has not."""
    if not 0 <= number < cells:
        raise ConfigError(f"--cell must be between 0 and {cells - 1}, not {number}: the matrix has {cells} cells")
    return [number]
