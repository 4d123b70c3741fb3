"""Fixtures of the device: a real process with a fake guest."""

from collections.abc import Iterator

import pytest

from tests.vmkit.vsock.device_process import Bench, open_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A device whose guest has booted."""
    with open_bench() as it:
        it.driver.boot()
        yield it


@pytest.fixture
def cold_bench() -> Iterator[Bench]:
    """A device that the front-end has not spoken to yet."""
    with open_bench() as it:
        yield it
