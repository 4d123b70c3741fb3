"""One of two programs that write the same file at the same time."""

from pathlib import Path

from tests.vmkit.copy.conftest import Peers
from vmkit.copy.copying import copy
from vmkit.copy.endpoints import plan_copy


def main(source: str, home: str) -> None:
    """Copies a file three times to `same`."""
    peers = Peers(Path(home))
    sources, destination = plan_copy([source, "m:same"])
    for _ in range(3):
        copy(sources, destination, peers.connect)
    peers.stop()
