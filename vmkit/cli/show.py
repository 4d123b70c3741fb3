"""How vmkit speaks to a person: progress on stderr, answers on stdout, JSON where a machine reads."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TextIO

from vsh.text import Cleaner

Tell = Callable[[str, float | None], None]


@contextlib.contextmanager
def open_progress(*, quiet: bool) -> Iterator[Tell]:
    """A callable tell(text, fraction): a live line in a terminal, one line per new text elsewhere."""
    if quiet:
        yield lambda _text, _fraction: None
        return
    if not sys.stderr.isatty():
        yield _tell_plainly()
        return
    # Imported here: rich takes longer to import than most verbs take in all.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    spinner = SpinnerColumn("dots" if "utf" in console.encoding else "line")
    columns = (spinner, TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("looking at this host", total=None)

        def tell(text: str, fraction: float | None) -> None:
            progress.update(task, description=text, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield tell


def _tell_plainly() -> Tell:
    """For logs: each stage once; the single steps of a stage, which come with a fraction, are for a terminal."""
    last = ""

    def tell(text: str, fraction: float | None) -> None:
        nonlocal last
        if fraction is None and text != last:
            last = text
            print(f"vmkit: {text}", file=sys.stderr, flush=True)

    return tell


class Writer(Protocol):
    """Where a guest's output goes."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def finish(self) -> None:
        """No more will come."""


class RawWriter:
    """The bytes on stdout, for those who asked for them."""

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def finish(self) -> None:
        pass


class CleanWriter:
    """The text on a stream of ours, without what could steer the terminal there."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._cleaner = Cleaner()

    def write(self, data: bytes) -> None:
        self._print(self._cleaner.feed(data))

    def finish(self) -> None:
        self._print(self._cleaner.finish())

    def _print(self, text: str) -> None:
        # As UTF-8, whatever the locale: it is what the guest wrote.
        self._stream.buffer.write(text.encode())
        self._stream.buffer.flush()


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def read_wall(record: Mapping[str, object]) -> dict[str, str]:
    """The layers of a machine's wall as its guest found them when it came up; empty before that."""
    wall = record.get("wall")
    return {str(layer): str(state) for layer, state in wall.items()} if isinstance(wall, dict) else {}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: aligned in a terminal and in a pipe."""
    from rich.console import Console  # noqa: PLC0415  (see open_progress)
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # What is shown is text: brackets and colons in it are no markup and no emoji.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # A pipe has no width to fit into: nothing is cut there.
        console.width = 1000
    console.print(table)
