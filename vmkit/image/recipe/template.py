"""Jinja2 templates become text, strictly: an undefined variable is an error with the template's file and line.

Pure but for reading templates. Nothing else imports Jinja2, so that a build that finds its image in the cache never
loads it.
"""

import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from vmkit.errors import ConfigError


class Renderer:
    """Templates of a list of folders; a name is taken from the first folder that has it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [str(folder) for folder in folders]
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self._folders),
            undefined=jinja2.StrictUndefined,
            # The output is shell, tables and text for a guest, never HTML.
            autoescape=False,  # noqa: S701
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # Most templates become shell: `{{ word | quote }}` is one word there, whatever it holds.
        self._environment.filters["quote"] = lambda value: shlex.quote(str(value))

    def render(self, name: str, variables: Mapping[str, object]) -> str:
        """The text of template `name`. Raises ConfigError with file and line for whatever is wrong with it."""
        try:
            return self._environment.get_template(name).render(variables)
        except jinja2.TemplateNotFound as error:
            where = ", ".join(self._folders)
            raise ConfigError(f"there is no template '{error.name}'", details=f"looked in {where}") from error
        except jinja2.TemplateSyntaxError as error:
            place = f"{error.filename or name}:{error.lineno}"
            raise ConfigError(f"{place}: template syntax: {error.message}") from error
        except jinja2.UndefinedError as error:
            known = ", ".join(sorted(variables))
            raise ConfigError(
                f"{self._place(error, name)}: template variable: {error.message}",
                hint=f"set it in the recipe's [variables]; known here: {known}",
            ) from error
        except Exception as error:  # a template may call anything: a filter's TypeError is still the template's fault
            raise ConfigError(f"{self._place(error, name)}: template: {error}") from error

    def _place(self, error: Exception, name: str) -> str:
        """Jinja2 rewrites tracebacks so that a template's own frames carry its file and line."""
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if any(frame.filename.startswith(folder) for folder in self._folders):
                return f"{frame.filename}:{frame.lineno}"
        return name
