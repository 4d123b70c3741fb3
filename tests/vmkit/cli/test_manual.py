"""docs/man/vmkit.1 has every verb, option, status, variable and file that the program has, and no other."""

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from vmkit.cli.main import VERBS, vmkit
from vmkit.machine.running import LOG_KINDS

CHECKOUT = Path(__file__).resolve().parents[3]
PAGE = CHECKOUT / "docs/man/vmkit.1"
LINES = [line.replace("\\-", "-") for line in PAGE.read_text().splitlines() if not line.startswith('.\\"')]
TEXT = "\n".join(LINES)


def section(heading: str) -> str:
    """The lines below a heading, to the next one of any level."""
    start = next(
        index for index, line in enumerate(LINES) if re.match(rf'\.S[SH] "?{re.escape(heading)}(?![\w-])', line)
    )
    end = next(index for index in range(start + 1, len(LINES)) if re.match(r"\.S[SH]( |$)", LINES[index]))
    return "\n".join(LINES[start + 1 : end])


def options_of(command: click.Command) -> set[str]:
    """A verb's options; those of all verbs of a group."""
    inner = command.commands.values() if isinstance(command, click.Group) and command is not vmkit else ()
    own = {name for param in command.params if isinstance(param, click.Option) for name in param.opts}
    return own.union(*map(options_of, inner))


def options_in(text: str) -> set[str]:
    """The options that paragraphs begin with."""
    tags = re.findall(r"^\.TP\n(.*)$", text, re.MULTILINE)
    return {word for tag in tags for word in re.findall(r"(?<![\w-])--?[a-zA-Z][a-z0-9-]*", tag)}


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_option_of_a_verb_is_in_its_section_and_no_other(verb: str) -> None:
    command = vmkit.get_command(click.Context(vmkit), verb)
    assert command is not None
    assert options_in(section(verb)) == options_of(command)


def values_of(command: click.Command) -> set[tuple[str, str]]:
    """Each option with a value of a verb, and of all verbs of a group, and the words of its value in the help."""
    inner = command.commands.values() if isinstance(command, click.Group) and command is not vmkit else ()
    context = click.Context(command)
    options = [param for param in command.params if isinstance(param, click.Option) and not param.is_flag]
    own = {(option.opts[-1], word) for option in options for word in re.findall(r"\w+", option.make_metavar(context))}
    return own.union(*map(values_of, inner))


@pytest.mark.parametrize("verb", list(VERBS))
def test_values_of_options_have_the_names_of_the_help(verb: str) -> None:
    command = vmkit.get_command(click.Context(vmkit), verb)
    assert command is not None
    tags = re.findall(r"^\.TP\n(.*)$", section(verb), re.MULTILINE)
    wrong = [
        (option, word)
        for option, word in values_of(command)
        if not any(re.search(rf"(?<![\w-]){option}(?![\w-]).*\b(f[IRB])?{word}\b", tag) for tag in tags)
    ]
    assert wrong == []


def test_options_of_all_verbs_are_there() -> None:
    assert options_in(section("OPTIONS")) == options_of(vmkit) | {"-h", "--help"}


def test_verbs_come_in_the_order_of_the_help() -> None:
    headings = re.findall(r'^\.SS "?([\w-]+)', TEXT, re.MULTILINE)
    assert headings == list(VERBS)


def test_defaults_are_the_programs() -> None:
    up = vmkit.get_command(click.Context(vmkit), "up")
    assert up is not None
    defaults = {param.name: param.default for param in up.params}
    assert f"{defaults['memory']} by default" in section("up")
    assert f"ready; {float(str(defaults['timeout_s'])):g} by default" in section("up")
    assert f"CPUs; {defaults['cpus']} by default" in section("up")


def test_every_variable_of_the_environment_is_there() -> None:
    sources = "\n".join(path.read_text() for path in (CHECKOUT / "vmkit").rglob("*.py"))
    used = set(re.findall(r"\b(?:VMKIT|VSH)_[A-Z][A-Z_]+\b", sources)) - {"VMKIT_", "VSH_CONFIG"}
    named = set(re.findall(r"^\.B ((?:VMKIT|VSH)_[A-Z_]+)$", section("ENVIRONMENT"), re.MULTILINE))
    assert named == used


def test_every_log_and_status_is_there() -> None:
    for name in LOG_KINDS.values():
        assert name in section("FILES")
    for status in ("0", "1", "64"):
        assert f".TP\n.B {status}\n" in section("EXIT STATUS") + "\n"


@pytest.mark.skipif(shutil.which("man") is None, reason="no man to check the page with")
def test_page_renders_without_warnings() -> None:
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    done = subprocess.run(["man", "--warnings", "-l", str(PAGE)], capture_output=True, check=True, env=environ)
    assert done.stderr == b""
    assert len(done.stdout) > 4000
