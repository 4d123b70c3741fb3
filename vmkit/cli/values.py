"""Values of options that several verbs take: parsed once, refused with a reason."""

import math
from typing import Any

import click

from vmkit.machine.spec import MAX_TIMEOUT_S


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


SECONDS = Seconds(0, MAX_TIMEOUT_S)
