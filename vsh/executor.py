"""The narrow interface to a guest: commands and files, over any transport.

vsh.client.Client implements it over vsock, vmkit.bench.guest.SshGuest with the program ssh, and ParamikoGuest beside it
with that library. Code that takes an Executor works with each of them.
"""

from collections.abc import Sequence
from typing import Protocol

from vsh.client import Result


class Executor(Protocol):
    """Runs commands in one guest and moves files in and out of it."""

    def run(self, argv: Sequence[str | bytes]) -> Result[bytes]:
        """Runs a command to its end. Raises VshError kinds when it could not be run."""

    def push(self, source: str, destination: str) -> None:
        """Copies a file or a directory of the host to a path of the guest. Raises VshError kinds."""

    def pull(self, source: str, destination: str) -> None:
        """Copies a file or a directory of the guest to a path of the host. Raises VshError kinds."""

    def exists(self, path: str) -> bool:
        """Whether the guest has a file of any kind at this path. A link counts, wherever it leads."""

    def close(self) -> None:
        """Closes the executor's connections. The guest goes on."""
