"""What an engine needs to know of a matrix to run it as one array of tasks. Pure."""

import math
import re
from dataclasses import dataclass

from vmkit.errors import ConfigError
from vmkit.matrix.execute import OVERHEAD_MIB
from vmkit.matrix.plan import Matrix

# Beside the commands: the start of the machine on a busy node without KVM, and its end.
START_LIMIT_S = 300
# A machine that failed for the node's sake is worth another node, twice.
DEFAULT_RETRIES = 2
# RFC 1123's label, which Kubernetes demands of a name, with space for `-merge` behind it.
_MAX_NAME = 50


@dataclass(frozen=True, slots=True)
class Batch:
    """The tasks of a matrix, numbered from 0.

    name: a label of small letters, digits and hyphens. file, results: paths as the nodes see them. count: tasks.
    is_sharded: a task is a shard of several cells, else one cell. memory_mib, cpus: of one task, everything included.
    limit_s: the longest time that one task can need. retries: of a task whose machine or node failed.
    """

    name: str
    file: str
    results: str
    count: int
    is_sharded: bool
    memory_mib: int
    cpus: int
    limit_s: int
    retries: int = DEFAULT_RETRIES

    @property
    def shard_words(self) -> tuple[str, ...]:
        """What a shard's run has as options.

        It has room for one machine. And it repeats a cell itself: beside a test that failed, no engine would.
        """
        again = ("--retry-machine-failures", str(self.retries)) if self.retries else ()
        return ("--shard", f"auto/{self.count}", "--jobs", "1", *again)


def plan_batch(
    matrix: Matrix, file: str, results: str, *, shards: int | None = None, retries: int = DEFAULT_RETRIES
) -> Batch:
    """Plans a task for each cell, or as many as shards. Raises ConfigError for more shards than cells."""
    cells = len(matrix.cells)
    if shards is not None and shards > cells:
        raise ConfigError(f"--shards must be at most {cells}, the number of cells, not {shards}")
    for what, path in (("the matrix", file), ("the results", results)):
        if not path.isprintable():
            raise ConfigError(f"the path of {what} must be of printable characters, not {path!r}")
    count = shards or cells
    commands = max(len(cell.commands) for cell in matrix.cells)
    cell_limit_s = math.ceil(commands * matrix.timeout_s) + START_LIMIT_S
    return Batch(
        name=_make_name(file),
        file=file,
        results=results,
        count=count,
        is_sharded=shards is not None,
        memory_mib=matrix.memory_mib + OVERHEAD_MIB,
        cpus=int(matrix.options["cpus"]),
        limit_s=cell_limit_s * math.ceil(cells / count),
        retries=retries,
    )


def _make_name(file: str) -> str:
    """The file's name without its ending, as a label."""
    stem = file.rsplit("/", 1)[-1].removesuffix(".toml").lower()
    return f"vmkit-{re.sub('[^a-z0-9]+', '-', stem)[:_MAX_NAME]}".strip("-")
