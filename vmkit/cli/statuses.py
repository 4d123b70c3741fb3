"""Verbs whose exit status another program judges, so that bad usage must have one of its own."""

from typing import Any

import click

from vsh.errors import UsageError


class JudgedCommand(click.Command):
    """A verb that ends with `usage_status` where its words are wrong, and not with 64."""

    def __init__(self, *args: Any, usage_status: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._usage_status = usage_status

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            path = "vmkit" if error.ctx is None else error.ctx.command_path
            raise UsageError(error.format_message(), hint=f"{path} --help", status=self._usage_status) from error
