"""vmkit's output: progress on stderr, answers on stdout, JSON for programs."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from vsh.text import Cleaner

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Tell = Callable[[str, float | None], None]
# A copy reports each piece; a person reads some of the reports.
SHOW_S = 0.1


@contextlib.contextmanager
def open_progress(*, quiet: bool) -> Iterator[Tell]:
    """Yields a callable tell(text, fraction): a live line in a terminal, one line per new text elsewhere."""
    if quiet:
        yield lambda _text, _fraction: None
        return
    if not sys.stderr.isatty():
        yield _tell_plainly()
        return
    # Imported here: rich takes longer to import than most verbs take in all.
    from rich.console import Console  # noqa: PLC0415

    with _open_live(Console(stderr=True)) as (_, tell):
        yield tell


@contextlib.contextmanager
def _open_live(console: "Console") -> "Iterator[tuple[Progress, Tell]]":
    """A line that changes, at the end of a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    spinner = SpinnerColumn("dots" if "utf" in console.encoding else "line")
    columns = (spinner, TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("looking at this host", total=None)

        def tell(text: str, fraction: float | None) -> None:
            progress.update(task, description=text, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield progress, tell


class Lines(Protocol):
    """Progress of many things: a line of text that stays for each, and below them what goes on."""

    def tell(self, text: str, fraction: float | None) -> None:
        """Shows what goes on, and what fraction of all is done."""

    def add(self, text: str) -> None:
        """Prints a line that stays."""


class PlainLines:
    """For logs: both are lines. quiet: neither."""

    def __init__(self, *, quiet: bool) -> None:
        self._tell: Tell = (lambda _text, _fraction: None) if quiet else _tell_plainly()

    def tell(self, text: str, fraction: float | None) -> None:
        """What goes on comes without a fraction: the lines that stay say the rest."""
        self._tell(text, fraction)

    def add(self, text: str) -> None:
        self._tell(text, None)


@contextlib.contextmanager
def open_lines(*, quiet: bool) -> Iterator[Lines]:
    """Yields where to show progress of many things: in a terminal the line below stays alive."""
    if quiet or not sys.stderr.isatty():
        yield PlainLines(quiet=quiet)
        return
    from rich.console import Console  # noqa: PLC0415  (see open_progress)

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with _open_live(console) as (progress, tell):

        class LiveLines:
            def tell(self, text: str, fraction: float | None) -> None:
                tell(text, fraction)

            def add(self, text: str) -> None:
                progress.console.print(text, soft_wrap=True)

        yield LiveLines()


class Moved(Protocol):
    """How far a copy is: bytes that arrived, and bytes and files that it knows of."""

    bytes: int
    files: int
    found_bytes: int
    found_files: int


@contextlib.contextmanager
def open_transfer(*, quiet: bool) -> Iterator[Callable[[Moved], None] | None]:
    """Yields a callable that shows bytes, rate and time left in a terminal; None where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  (see open_progress)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = (BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}", markup=False), *bar)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        next_s = 0.0

        def show(moved: Moved) -> None:
            nonlocal next_s
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + SHOW_S
                text = f"{moved.files} of {moved.found_files} files"
                # Bytes of streams and of /proc are in no file's size.
                progress.update(
                    task, description=text, completed=moved.bytes, total=max(moved.found_bytes, moved.bytes)
                )

        yield show


def _tell_plainly() -> Tell:
    """Prints each stage once, for logs. Leaves out the steps of a stage, which come with a fraction."""
    last = ""

    def tell(text: str, fraction: float | None) -> None:
        nonlocal last
        if fraction is None and text != last:
            last = text
            print(f"vmkit: {text}", file=sys.stderr, flush=True)

    return tell


class Writer(Protocol):
    """A destination of a guest's output."""

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""

    def finish(self) -> None:
        """Writes the rest: no more bytes come."""


class RawWriter:
    """Writes the raw bytes to stdout, for `--raw`."""

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def finish(self) -> None:
        pass


class CleanWriter:
    """Writes the text to a stream of ours, without control characters that steer a terminal."""

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
    """Prints one JSON document to stdout."""
    print(json.dumps(value, indent=2))


def read_wall(record: Mapping[str, object]) -> dict[str, str]:
    """Returns the layers of a machine's wall as its guest reported them at its start; empty before that."""
    wall = record.get("wall")
    return {str(layer): str(state) for layer, state in wall.items()} if isinstance(wall, dict) else {}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a plain table, aligned in a terminal and in a pipe."""
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
