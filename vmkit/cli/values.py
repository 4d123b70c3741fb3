"""Values that several verbs take: parses them, refuses wrong ones with a reason, and completes them for a shell."""

import math
from typing import TYPE_CHECKING, Any

import click

from vmkit.machine.spec import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    NumberType = click.ParamType[float]
else:
    # Before click 8.2 it takes no parameter.
    NumberType = click.ParamType


class Number(NumberType):
    """A number from `low` to `high`; None: it has no upper limit. name: in upper case, what the help calls the value.

    Click's own ranges are called INTEGER RANGE in the help, and print their limits as x>=1.
    """

    def __init__(self, name: str, low: float, high: float | None = None, unit: str = "") -> None:
        self.name = name
        self._low = low
        self._high = high
        self._unit = unit and f" {unit}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.parse(value)
        except ValueError:
            self.fail(f"must be {self._describe()}, not '{value}'", param, ctx)
        # NaN compares false with everything.
        if not self._low <= number <= (math.inf if self._high is None else self._high):
            self.fail(f"must be {self._describe()}, not {value}", param, ctx)
        return number

    def parse(self, value: Any) -> float:
        """Raises ValueError."""
        return int(value)

    def _describe(self) -> str:
        if self._high is None:
            return f"at least {self._low:.0f}{self._unit}"
        return f"between {self._low:.0f} and {self._high:.0f}{self._unit}"


class Seconds(Number):
    """A number of seconds that a wait can have: not longer than poll(2) can count."""

    def __init__(self) -> None:
        super().__init__("seconds", 0, MAX_TIMEOUT_S, "seconds")

    def parse(self, value: Any) -> float:
        return float(value)


def parse_gdb_port(text: str | None) -> int | None:
    """Returns the port of `--gdb=PORT`; None for `--gdb` alone, without it, and for a word that is no number."""
    return int(text) if text and text.isascii() and text.isdecimal() else None


SECONDS = Seconds()
COUNT = Number("count", 1)
# linux/vm_sockets.h: VMADDR_PORT_ANY is the highest number, and no port.
VSOCK_PORT = Number("port", 1, 2**32 - 2)


def complete_machines(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the running machines."""
    from vsh.registry import read_machines  # noqa: PLC0415  (only a shell asks)

    return [machine.name for machine in read_machines() if machine.name.startswith(incomplete)]


def complete_endpoints(context: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Returns the running machines as the start of a path on them, and after `NAME:` the paths there.

    The shell completes a path of this host itself.
    """
    from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

    machine, colon, path = incomplete.partition(":")
    if colon and "/" not in machine:
        from vmkit.cli.guestpaths import list_paths  # noqa: PLC0415  (only a shell asks)

        return [CompletionItem(f"{machine}:{found}") for found in list_paths(machine, path)]
    machines = [] if "/" in incomplete else complete_machines(context, param, incomplete)
    return [*(CompletionItem(f"{name}:") for name in machines), CompletionItem(incomplete, type="file")]


def complete_snapshots(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the names of the snapshots."""
    from vmkit.machine.restore import open_store  # noqa: PLC0415  (only a shell asks)

    return [one.name for one in open_store().read_all() if one.name.startswith(incomplete)]


def complete_pools(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the names of the running pools."""
    from vmkit.pool.registry import read_pools  # noqa: PLC0415  (only a shell asks)

    return [one.name for one in read_pools() if one.name.startswith(incomplete)]


def complete_stored(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Returns the names of the stored machines."""
    from vmkit.errors import HostError  # noqa: PLC0415  (only a shell asks)
    from vmkit.stored.place import list_names  # noqa: PLC0415

    try:
        return [name for name in list_names() if name.startswith(incomplete)]
    except HostError:
        return []


def complete_sources(_context: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Lets the shell complete a path. After a scheme there is none."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

    return [CompletionItem(incomplete, type="file")]


def complete_startable(context: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Returns the stored machines and the shipped images."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

    names = [] if "/" in incomplete else complete_stored(context, param, incomplete)
    return [*map(CompletionItem, names), *complete_images(context, param, incomplete)]


def complete_images(_context: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Returns the shipped images. The shell completes a path itself."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

    from vmkit.image.recipe.resources import find_images_dir  # noqa: PLC0415

    if "/" in incomplete or incomplete.startswith("."):
        return [CompletionItem(incomplete, type="file")]
    names = sorted(path.stem for path in find_images_dir().glob("*.toml"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
