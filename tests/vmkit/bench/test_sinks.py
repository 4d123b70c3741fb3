"""What runs beside the race's programs, as far as it runs without a guest."""

import subprocess

import pytest

from vmkit.bench.sinks import SOURCE_BLOCK_BYTES, plan_source


def test_source_writes_that_much_and_nothing_else() -> None:
    size = 3 * SOURCE_BLOCK_BYTES
    done = subprocess.run(["busybox", *plan_source(size)], capture_output=True, check=True)
    assert done.stdout == bytes(size)
    assert done.stderr == b""


def test_source_writes_whole_blocks() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        plan_source(SOURCE_BLOCK_BYTES + 1)
