"""What the tests of virtiofsd's guard and of its deputy share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.shares.guarded import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A guard with its device. It goes on until QEMU has let go of the device, and no longer."""
    made = Bench(tmp_path)
    yield made
    made.close()
    assert os.waitpid(made.process.pid, 0)[1] == 0
