"""Renders templates in a process of its own: a job in JSON comes in, texts or an error go out. Run as a script.

Three walls, each for the case that the one before it has a hole. Jinja2's sandbox keeps templates from Python's
insides. The process has no files: what it may render is in the job, and it can open nothing, a socket neither. Limits
of processor time and memory end what would not end by itself. Imports nothing of vmkit; nothing else imports Jinja2.
"""

import codecs
import html
import json
import pprint
import resource
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

# The hard limit kills. It is for code that does not return to Python in time for the soft limit's signal.
_GRACE_S = 2
# What Jinja2 and MarkupSafe import when they first need it, and could not then: there are no files.
_PRELOADED = (html, pprint, textwrap)
_CODECS = ("ascii", "unicode-escape", "utf-8")
# Globals of Jinja2's own that a configuration file has a use for. `lipsum` makes any amount of text.
_GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")


class _TooLongError(Exception):
    """The processor time is used up."""


def main() -> None:
    """Reads the job from stdin and writes the answer to stdout."""
    job = json.load(sys.stdin.buffer)
    sys.path[:] = job["path"]
    import jinja2.debug  # noqa: PLC0415 - found by the job's path
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    assert jinja2.debug
    for name in _CODECS:
        codecs.lookup(name)
    _set_limits(job["cpu_s"], job["memory_bytes"])
    answer = _render(ImmutableSandboxedEnvironment, job)
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


def _set_limits(cpu_s: int, memory_bytes: int) -> None:
    def stop(_number: int, _frame: object) -> NoReturn:
        raise _TooLongError

    signal.signal(signal.SIGXCPU, stop)
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + _GRACE_S),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        # What is open stays so: stdin, stdout, stderr.
        (resource.RLIMIT_NOFILE, 0, 0),
    ):
        resource.setrlimit(limit, (soft, hard))


def _render(environment_class: Any, job: Mapping[str, Any]) -> dict[str, object]:
    from jinja2 import FunctionLoader, StrictUndefined, TemplateNotFound, TemplateSyntaxError, UndefinedError  # noqa: PLC0415

    templates: dict[str, tuple[str, str, str]] = job["templates"]

    def load(name: str) -> tuple[str, str, None]:
        known = templates.get("/".join(part for part in name.split("/") if part not in ("", ".")))
        if known is None or known[2]:
            raise TemplateNotFound(name, known[2] if known else None)
        return known[1], known[0], None

    environment = environment_class(
        loader=FunctionLoader(load),
        undefined=StrictUndefined,
        # The output is shell, tables and text for a guest, never HTML.
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    # Most templates become shell: `{{ word | quote }}` is one word there, whatever it holds.
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    variables = {name: _freeze(value) for name, value in job["variables"].items()}
    texts: dict[str, str] = {}
    name = ""
    try:
        for name in job["names"]:
            texts[name] = environment.get_template(name).render(variables)
    except TemplateNotFound as error:
        if error.message != error.name:
            return _explain(f"'{error.name}' cannot be a template: {error.message}")
        folders = "templates are looked for in the recipe's `templates` folders and in vmkit's own"
        return _explain(f"there is no template '{error.name}'", details=folders)
    except TemplateSyntaxError as error:
        return _explain(f"{error.filename or name}:{error.lineno}: template syntax: {error.message}")
    except UndefinedError as error:
        hint = f"set it in the recipe's [variables]; known here: {', '.join(sorted(variables))}"
        return _explain(f"{_find_place(error, templates, name)}: template variable: {error.message}", hint=hint)
    except (_TooLongError, MemoryError) as error:
        limit = f"{job['memory_bytes'] >> 20} MiB" if isinstance(error, MemoryError) else f"{job['cpu_s']} s"
        return _explain(f"{_find_place(error, templates, name)}: template: it needs more than {limit}")
    except Exception as error:  # a template may call anything: a filter's TypeError is still the template's fault
        return _explain(f"{_find_place(error, templates, name)}: template: {error}")
    return {"texts": texts}


def _freeze(value: object) -> object:
    """A list as a tuple, as the recipe's own values are."""
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _explain(brief: str, *, details: str = "", hint: str = "") -> dict[str, object]:
    return {"brief": brief, "details": details, "hint": hint}


def _find_place(error: BaseException, templates: Mapping[str, tuple[str, str, str]], name: str) -> str:
    """Jinja2 rewrites tracebacks so that a template's own frames carry its file and line."""
    paths = {path for path, _, _ in templates.values()}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_filename in paths:
            return f"{frame.f_code.co_filename}:{line}"
    return name


if __name__ == "__main__":
    main()
