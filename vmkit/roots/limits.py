"""How much a root may hold: a ceiling for each thing that an archive of a few kilobytes can claim to have."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmkit.errors import BuildError


@dataclass(frozen=True, slots=True)
class RootLimits:
    """Ceilings for one root, all its layers together.

    Docker itself stops at 127 layers. A large desktop has 500,000 files, an image for machine learning 15 GB.
    """

    layers: int = 500
    entries: int = 1_000_000
    size_bytes: int = 32 << 30
    # Of a manifest or a configuration; registries take 4 MiB.
    document_bytes: int = 8 << 20


class Budget:
    """What is left of the limits while a root is read. Each method raises BuildError when its limit is passed."""

    def __init__(self, limits: RootLimits) -> None:
        self.limits = limits
        self._entries = 0
        self._size_bytes = 0
        self._unpacked_bytes = 0

    def take_layers(self, count: int) -> None:
        if count > self.limits.layers:
            raise BuildError(
                f"the image has {count} layers, more than {self.limits.layers}",
                hint="make one layer of them, for example with docker export",
            )

    def take_entry(self, size_bytes: int) -> None:
        """One file of an archive or a folder."""
        self._entries += 1
        self._size_bytes += size_bytes
        if self._entries > self.limits.entries:
            raise BuildError(
                f"the root has more than {self.limits.entries} files", hint="leave out what it can do without"
            )
        if self._size_bytes > self.limits.size_bytes:
            raise self._refuse_size()

    def take_unpacked(self, size_bytes: int) -> None:
        """Bytes that a packed archive became."""
        self._unpacked_bytes += size_bytes
        if self._unpacked_bytes > self.limits.size_bytes:
            raise self._refuse_size()

    def limit(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Passes on what a packed archive becomes, up to the limit."""
        for chunk in chunks:
            self.take_unpacked(len(chunk))
            yield chunk

    def _refuse_size(self) -> BuildError:
        return BuildError(
            f"the root is larger than {self.limits.size_bytes >> 20} MiB when it is unpacked",
            hint="give a disk image instead, which has no such limit",
        )
