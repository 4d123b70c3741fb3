"""Which cells a job runs: by number, by share, and as each engine numbers its jobs."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmkit.errors import ConfigError
from vmkit.matrix.shards import MAX_SHARDS, Shard, parse_shard, pick_number, plan_shards


@pytest.mark.parametrize(
    ("text", "environ", "shard"),
    [
        ("2/8", {}, Shard(2, 8)),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 100)),
        ("auto", {"JOB_COMPLETION_INDEX": "99"}, Shard(100, 100)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, Shard(8, 8)),
        (
            "auto",
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "6"},
            Shard(5, 6),
        ),
        # One task of an array that was submitted again.
        (
            "auto/6",
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "1"},
            Shard(6, 6),
        ),
        ("auto", {"CI_NODE_INDEX": "3", "CI_NODE_TOTAL": "3"}, Shard(3, 3)),
        ("auto", {"BUILDKITE_PARALLEL_JOB": "0", "BUILDKITE_PARALLEL_JOB_COUNT": "4"}, Shard(1, 4)),
    ],
)
def test_shard_is_named_or_found(text: str, environ: dict[str, str], shard: Shard) -> None:
    assert parse_shard(text, {"HOME": "/root", **environ}, 100) == shard


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("0/8", {}, "--shard 0/8: the number must be between 1 and 8"),
        ("9/8", {}, "--shard 9/8: the number must be between 1 and 8"),
        ("1/0", {}, f"--shard 1/0: the count must be between 1 and {MAX_SHARDS}"),
        ("1", {}, "--shard cannot be '1'"),
        ("-1/4", {}, "--shard cannot be '-1/4'"),
        ("auto", {}, "no variable of an engine"),
        ("auto", {"JOB_COMPLETION_INDEX": "100"}, "JOB_COMPLETION_INDEX=100: the number must be between 0 and 99"),
        ("auto", {"CI_NODE_INDEX": "0", "CI_NODE_TOTAL": "3"}, "CI_NODE_INDEX=0: the number must be between 1 and 3"),
        ("auto", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX must be a number, not 'x'"),
        ("auto", {"CI_NODE_INDEX": "1"}, "CI_NODE_TOTAL must be a number, not ''"),
        ("auto", {"CI_NODE_INDEX": "1", "JOB_COMPLETION_INDEX": "1"}, "both JOB_COMPLETION_INDEX and CI_NODE_INDEX"),
    ],
)
def test_shard_that_does_not_exist_is_refused(text: str, environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_shard(text, environ, 100)


def test_cell_out_of_range_is_refused_with_the_range() -> None:
    assert pick_number(0, 6) == [0]
    with pytest.raises(ConfigError, match="--cell must be between 0 and 5, not 6: the matrix has 6 cells"):
        pick_number(6, 6)


def test_more_shards_than_cells_leave_some_without() -> None:
    assert plan_shards(["a", "b"], 3, {}) == [[0], [1], []]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(
    seconds=st.lists(st.one_of(st.none(), st.floats(0, 1000)), max_size=200),
    count=st.integers(1, 40),
)
def test_each_cell_is_in_one_shard(seconds: list[float | None], count: int) -> None:
    names = [str(number) for number in range(len(seconds))]
    times = {name: one for name, one in zip(names, seconds, strict=True) if one is not None}
    shards = plan_shards(names, count, times)
    assert len(shards) == count
    assert sorted(number for shard in shards for number in shard) == list(range(len(names)))
    if len(times) == len(names) and names:
        # Whoever is last began before the mean was over.
        loads = [sum(times[names[number]] for number in shard) for shard in shards]
        assert max(loads) <= sum(loads) / count + max(times.values()) + 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_shards_of_many_cells_take_about_as_long(seed: int) -> None:
    """As a matrix of 400 cells over 20 jobs: the longest at most 1.15 times the mean."""
    dice = Random(seed)
    names = [str(number) for number in range(400)]
    times = {name: dice.uniform(10, 60) for name in names}
    loads = [sum(times[names[number]] for number in shard) for shard in plan_shards(names, 20, times)]
    assert max(loads) <= 1.15 * sum(loads) / 20
