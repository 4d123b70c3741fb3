"""Values that several verbs take: parsed once, refused with a reason, offered to a shell that completes them."""

import math
from typing import TYPE_CHECKING, Any

import click

from vmkit.machine.spec import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Seconds(click.FloatRange):
    """A number of seconds that a wait can have: not longer than poll(2) can count, and not `nan`, which is in every
    range.
    """

    name = "seconds"

    def _describe_range(self) -> str:
        # A week is no news to who reads the help.
        return ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"'{value}' is no number of seconds", param, ctx)
        return seconds


def parse_gdb_port(text: str | None) -> int | None:
    """The port of `--gdb=PORT`; None for `--gdb` alone, without it, and for a word that is no number."""
    return int(text) if text and text.isascii() and text.isdecimal() else None


SECONDS = Seconds(0, MAX_TIMEOUT_S)


def complete_machines(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The machines that run at this moment."""
    from vsh.registry import read_machines  # noqa: PLC0415  (only a shell asks)

    return [machine.name for machine in read_machines() if machine.name.startswith(incomplete)]


def complete_images(_context: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The shipped images; a path is the shell's to complete."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

    from vmkit.image.recipe.resources import find_images_dir  # noqa: PLC0415

    if "/" in incomplete or incomplete.startswith("."):
        return [CompletionItem(incomplete, type="file")]
    names = sorted(path.stem for path in find_images_dir().glob("*.toml"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
