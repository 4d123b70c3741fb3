"""Templates are strict: what is missing or wrong is told with file and line. What they may not do, they cannot."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.image.recipe import template as module
from vmkit.image.recipe.template import read_templates, render_templates

Render = Callable[..., str]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """render(text, more={name: text}, variable=value) gives what the template fam/x.j2 becomes."""

    def render(text: str, *, more: dict[str, str] | None = None, **variables: object) -> str:
        folder = tmp_path / "templates"
        for name, content in {"fam/x.j2": text, **(more or {})}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return render_templates(read_templates([folder], []), ["fam/x.j2"], variables)["fam/x.j2"]

    return render


def test_template_renders_and_keeps_its_last_newline(render: Render) -> None:
    assert render("{% if a %}\n{{ a | quote }} $x\n{% endif %}\n", a="it's") == "'it'\"'\"'s' $x\n"


def test_values_arrive_as_they_are(render: Render) -> None:
    text = "{{ words | join('+') }} {{ words }} {{ wall.kernel }} {{ number + 1 }} {{ flag }}"
    told = render(text, words=("a", "b"), wall={"kernel": "on"}, number=2, flag=True)
    assert told == "a+b ('a', 'b') on 3 True"


def test_filters_work_without_files(render: Render) -> None:
    """Jinja2 imports some of what it needs late, when the process has no files any more."""
    words = ["tojson", "urlize", "urlencode", "random", "truncate(3)", "striptags", "wordwrap(3)", "pprint", "title"]
    words += ["escape", "forceescape", "indent", "upper", "trim", "wordcount", "center(9)", "length", "list", "unique"]
    text = "".join(f"{{{{ 'a b c'|{word} }}}}\n" for word in words)
    told = render(text + "{{ 5|filesizeformat }} {{ {'a': 1}|xmlattr }} {{ '3'|int + '1.5'|float }} {{ [3, 1]|sum }}")
    assert len(told.splitlines()) >= len(words)
    assert told.endswith('5 Bytes  a="1" 4.5 4')


def test_missing_variable_names_file_line_and_variable(render: Render) -> None:
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:3: .*'hostnam' is undefined") as caught:
        render("one\n{{ known }}\n{{ hostnam }}\n", known=1)
    assert "known" in caught.value.hint


def test_missing_variable_in_an_included_template_names_that_one(render: Render) -> None:
    with pytest.raises(ConfigError, match=r"fam/y\.j2:2: "):
        render("{% include './fam/y.j2' %}\n", more={"fam/y.j2": "\n{{ gone }}\n"})


def test_syntax_error_names_file_and_line(render: Render) -> None:
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:2: template syntax: "):
        render("one\n{% if %}\n")


def test_failing_expression_names_file_and_line(render: Render) -> None:
    with pytest.raises(ConfigError, match=r"templates/fam/x\.j2:2: template: division by zero"):
        render("\n{{ 1 / zero }}\n", zero=0)


def test_unknown_template_is_named(render: Render) -> None:
    with pytest.raises(ConfigError, match=r"there is no template 'fam/z\.j2'") as caught:
        render("{% include 'fam/z.j2' %}")
    assert "`templates` folders" in caught.value.details


def test_first_folder_wins(tmp_path: Path) -> None:
    for folder in ("mine", "shipped"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text(folder)
    (tmp_path / "shipped/b").write_text("shipped")
    templates = read_templates([tmp_path / "mine", tmp_path / "shipped"], [])
    assert render_templates(templates, ["a", "b"], {}) == {"a": "mine", "b": "shipped"}


ESCAPES = [
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__call__.__globals__ }}",
    "{{ namespace().__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ ['']|groupby('__class__') }}",
    "{{ ['']|sort(attribute='__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
    "{{ (['{0.__class__.__mro__}']|map('attr', 'format')|first)('') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ range.__self__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{{ caller }}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{{ m._func.__globals__ }}{% macro m() %}{% endmacro %}",
    "{{ (1).__class__ }}",
    "{% import 'fam/x.j2' as me without context %}{{ me.__dict__ }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_template_reaches_nothing_of_python(render: Render, escape: str) -> None:
    try:
        told = render(escape)
    except ConfigError as error:
        told = str(error)
        assert re.search(r"is undefined|unsafe|no attribute|more than|recursion", told), told
    assert not re.search(r"uid=|<class|object at|<function|<built-in", told), told


@pytest.mark.parametrize("change", ["words.append('x')", "table.clear()", "table.update({})", "words.sort()"])
def test_template_changes_no_value(render: Render, change: str) -> None:
    with pytest.raises(ConfigError, match=r"fam/x\.j2:1: template"):
        render("{{ " + change + " }}", words=["a"], table={"a": 1})


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 'a'|center(10 ** 11) }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%99999999999d'|format(1) }}",
    "{{ '{:99999999999d}'.format(1) }}",
    "{{ range(10 ** 12)|list }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{% include 'fam/x.j2' %}",
    "{% extends 'fam/x.j2' %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
]


@pytest.mark.parametrize("text", ENDLESS)
def test_template_that_would_not_end_is_ended(render: Render, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module, "RENDER_CPU_S", 1)
    monkeypatch.setattr(module, "RENDER_MEMORY_BYTES", 256 << 20)
    with pytest.raises(ConfigError):
        render(text)


# What a template could do if it did reach Python.
REACHING_OUT = """
import os, socket
from vmkit.image.recipe.sandbox import _set_limits
_set_limits(5, 1 << 30)
for name, reach in {
    "read": lambda: open("/etc/passwd"),
    "write": lambda: open("/tmp/vmkit-test-written", "w"),
    "list": lambda: os.listdir("/"),
    "connect": lambda: socket.socket(),
    "pipe": lambda: os.popen("id").read(),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}) and os.wait()[1] and 1 / 0,
}.items():
    try:
        reach()
    except (OSError, ZeroDivisionError) as error:
        continue
    print(name)
"""


def test_process_of_templates_has_no_files(child_environ: dict[str, str]) -> None:
    words = [sys.executable, "-c", REACHING_OUT]
    done = subprocess.run(words, env=child_environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_recipe_is_never_a_template(tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text("{{ 1 }}")
    (tmp_path / "again.j2").hardlink_to(recipe)
    (tmp_path / "link.j2").symlink_to(recipe)
    (tmp_path / "a.j2").write_text("{% include 'my.toml' %}")
    templates = read_templates([tmp_path], [recipe])
    for name in ("my.toml", "again.j2", "link.j2", "a.j2"):
        with pytest.raises(ConfigError, match="cannot be a template: it is the recipe itself"):
            render_templates(templates, [name], {})


def test_template_lies_in_its_folder_and_is_a_plain_text(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    (folder / "in").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "out.j2").symlink_to(tmp_path / "secret")
    (folder / "up.j2").write_text("{% include '../secret' %}")
    (folder / "tree").symlink_to(tmp_path)
    (folder / "in/a.j2").write_text("fine")
    (folder / "b.j2").symlink_to("in/a.j2")
    os.mkfifo(folder / "fifo.j2")
    (folder / "binary.j2").write_bytes(b"\xff")
    (folder / "large.j2").write_bytes(b"x" * ((1 << 20) + 1))
    templates = read_templates([folder], [])
    assert render_templates(templates, ["b.j2"], {}) == {"b.j2": "fine"}
    for name, trouble in (
        ("out.j2", "symlink that leaves the template folder"),
        ("up.j2", r"there is no template '\.\./secret'"),
        ("tree/secret", "there is no template"),
        ("fifo.j2", "it is a FIFO, not a regular file"),
        ("binary.j2", "it is not UTF-8 text"),
        ("large.j2", "it is larger than 1 MiB"),
    ):
        with pytest.raises(ConfigError, match=trouble):
            render_templates(templates, [name], {})


def test_folder_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in (("FILE_COUNT_LIMIT", 2), ("FOLDER_LIMIT_BYTES", 5), ("FOLDER_COUNT_LIMIT", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            folder = tmp_path / limit
            for name in ("a", "b", "c"):
                (folder / name).mkdir(parents=True)
                (folder / name / "x").write_text("two")
            with pytest.raises(ConfigError, match=f"the template folder {folder} holds more than"):
                read_templates([folder], [])
    with pytest.raises(ConfigError, match="does not exist"):
        read_templates([tmp_path / "gone"], [])
