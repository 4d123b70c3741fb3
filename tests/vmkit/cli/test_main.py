"""What holds for every verb: help, usage errors, how errors look, signals, and streams in every state."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import vmkit.cli.program as program_module
from tests.vmkit.cli.conftest import Program, Vmkit
from vmkit.cli.main import TASKS, VERBS
from vmkit.cli.main import vmkit as program_group
from vmkit.errors import MachineError
from vmkit.machine.registry import reserve
from vshd.wire.version import __version__


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_verb_names_it_and_explains_every_option(vmkit: Vmkit, verb: str, flag: str) -> None:
    done = vmkit(verb, flag)
    assert done.status == 0
    assert done.err == ""
    assert done.out.startswith(f"Usage: vmkit {verb} ")
    options = done.out.split("Options:\n")[1].splitlines()
    unexplained = [
        line
        for line, following in zip(options, [*options[1:], ""], strict=True)
        if line.startswith("  -") and "  " not in line.strip() and not following.startswith(" " * 8)
    ]
    assert unexplained == []


def test_help_lists_every_verb(vmkit: Vmkit) -> None:
    done = vmkit("--help")
    assert done.status == 0
    for verb in VERBS:
        assert f"\n  {verb} " in done.out


def test_version_is_the_projects(vmkit: Vmkit) -> None:
    assert vmkit("--version").out == f"vmkit, version {__version__}\n"


def test_no_verb_is_bad_usage_and_shows_the_help(vmkit: Vmkit) -> None:
    done = vmkit()
    assert done.status == 64
    assert done.err.startswith("Usage: vmkit")


def find_options(command: click.Command, path: str) -> Iterator[tuple[str, click.Option, str]]:
    """Every option with a value, of a command and of those below it: where it is, and what the help calls its value."""
    context = click.Context(command)
    for param in command.params:
        if isinstance(param, click.Option) and not param.is_flag and not param.count:
            yield f"{path} {param.opts[-1]}", param, param.make_metavar(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from find_options(below, f"{path} {name}")


# Click's names of types: they tell a reader nothing.
GENERIC = {"TEXT", "INTEGER", "INTEGER RANGE", "FLOAT", "FLOAT RANGE", "PATH", "DIRECTORY", "FILENAME", "N"}


def test_help_names_what_every_value_of_an_option_is() -> None:
    found = list(find_options(program_group, "vmkit"))
    assert {"vmkit up --cpus", "vmkit docker run --user", "vmkit bench report --to"} <= {place for place, _, _ in found}
    generic = [f"{place} {metavar}" for place, _, metavar in found if metavar.strip("[]=") in GENERIC]
    assert generic == []


def test_help_shows_no_range_of_click(vmkit: Vmkit) -> None:
    assert "x>=" not in vmkit("ssh", "--help").out + vmkit("matrix", "--help").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("wait", "--timeout", "-1"), "'--timeout': must be between 0 and 604800 seconds, not -1"),
        (("wait", "--timeout", "soon"), "'--timeout': must be between 0 and 604800 seconds, not 'soon'"),
        (("matrix", "--jobs", "0", "lab.toml"), "'--jobs': must be at least 1, not 0"),
        (("ssh", "--port", "4294967295"), "'--port': must be between 1 and 4294967294, not 4294967295"),
    ],
)
def test_number_outside_its_limits_is_refused_with_them(vmkit: Vmkit, words: tuple[str, ...], said: str) -> None:
    done = vmkit(*words)
    assert (done.status, done.err.splitlines()[0]) == (64, f"vmkit: Invalid value for {said}")


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("nonsense",), "vmkit"),
        (("--nonsense",), "vmkit"),
        (("list", "extra"), "vmkit list"),
        (("list", "--nonsense"), "vmkit list"),
        (("logs", "--kind", "nonsense"), "vmkit logs"),
        (("wait", "--timeout", "soon"), "vmkit wait"),
        (("wait", "--timeout", "nan"), "vmkit wait"),
        (("down", "--timeout", "inf"), "vmkit down"),
        (("status", "a", "b"), "vmkit status"),
    ],
)
def test_bad_usage_ends_with_64_and_names_the_help(vmkit: Vmkit, words: tuple[str, ...], path: str) -> None:
    done = vmkit(*words)
    assert done.status == 64
    assert done.out == ""
    first, *_, last = done.err.splitlines()
    assert first.startswith("vmkit: ")
    assert last == f"hint: {path} --help"


def test_error_has_a_brief_details_and_a_hint(vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MachineError("it broke", details="line 1\nline 2", hint="mend it", status=7)

    monkeypatch.setattr("vmkit.cli.machines.sweep", fail)
    done = vmkit("list")
    assert done.status == 7
    assert done.err == "vmkit: it broke\n  line 1\n  line 2\nhint: mend it\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/some/where"), "vmkit: /some/where: Permission denied\n"),
        (OSError("odd"), "vmkit: odd\n"),
        (KeyError("k"), "vmkit: internal error: KeyError('k')\nhint: this is a fault of vmkit; "),
        (RecursionError(), "vmkit: internal error: RecursionError()\n"),
        # Python raises it for a damaged .pyc file, and click takes it for a person's Ctrl-D.
        (EOFError("marshal"), "\nvmkit: internal error: EOFError('marshal')\n"),
    ],
)
def test_unforeseen_error_is_no_traceback(
    vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vmkit.cli.machines.sweep", fail)
    done = vmkit("list")
    assert done.status == 1
    assert done.err.startswith(said)
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("words", "environ"), [(("--debug",), ""), ((), "1"), ((), "yes")])
def test_debug_shows_the_way_an_error_came(
    vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], environ: str
) -> None:
    monkeypatch.setenv("VMKIT_DEBUG", environ)
    done = vmkit(*words, "status", "nobody")
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert "\nvmkit: no machine named 'nobody' is running\n" in done.err


@pytest.mark.parametrize("environ", ["0", "false", ""])
def test_debug_that_is_off_is_off(vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch, environ: str) -> None:
    monkeypatch.setenv("VMKIT_DEBUG", environ)
    assert "Traceback" not in vmkit("status", "nobody").err


@pytest.mark.parametrize(
    "words", [("list", "--json"), ("images",), ("--help",), ("--version",), ("up", "--help"), ("completion", "bash")]
)
def test_reader_that_has_gone_is_no_error_to_talk_about(program: Program, words: tuple[str, ...]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        done = program(*words, stdout=write_fd)
    finally:
        os.close(write_fd)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.parametrize("words", [("list", "--json"), ("images",)])
@pytest.mark.parametrize("term", ["xterm", None])
def test_answer_that_cannot_be_written_is_an_error(
    program: Program, words: tuple[str, ...], term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, whether the table is written at once or when the program ends."""
    for name in ("TERM", "LANG", "LC_ALL", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    with Path("/dev/full").open("wb") as full:
        done = program(*words, stdout=full)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(folders: Path, closed: str) -> None:
    command = f"exec 3>&1; {sys.executable} -m vmkit list --json {closed}; echo $? >&3"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    if ">&-" not in closed.split():
        assert json.loads(done.stdout.rsplit("\n", 2)[0]) == []
    assert done.stderr == ""


def test_errors_go_nowhere_else_when_stderr_is_closed(folders: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m vmkit status nobody 2>&-"], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == b""


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_letters_that_the_terminal_does_not_know_are_escaped(
    program: Program, locale: dict[str, str], folders: Path
) -> None:
    runtime = folders / "bücher"
    runtime.mkdir(mode=0o700)
    environ = {**os.environ, **locale, "PYTHONIOENCODING": "ascii", "VMKIT_RUNTIME_DIR": str(runtime)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
        with reserve("m", None, "m", {}):
            done = program("logs", "m", "--path", env=environ)
    assert done.returncode == 0, done.stderr
    assert b"cher/machines/m" in done.stdout


LOADING = """
import sys
class Slow:
    def find_spec(self, name, path, target=None):
        if name == "click":
            print("loading", flush=True)
            sys.stdin.read()
sys.meta_path.insert(0, Slow())
from vmkit.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "vmkit: interrupted\n"), (signal.SIGTERM, "")])
def test_program_that_still_loads_ends_without_a_traceback(number: signal.Signals, told: str) -> None:
    argv = [sys.executable, "-c", LOADING]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as loading:
        assert loading.stdout is not None
        assert loading.stdout.readline() == "loading\n"
        loading.send_signal(number)
        _, errors = loading.communicate(timeout=60)
    assert (loading.returncode, errors) == (128 + number, told)


SLEEPER = """
import os, signal, sys, time
import vmkit.cli.machines
from vmkit.__main__ import main
class Undo:
    def __enter__(self): pass
    def __exit__(self, *_):
        print("undoing", flush=True)
        time.sleep(0.3)
        print("undone", flush=True)
def sleep():
    with Undo():
        print("here", flush=True)
        # A signal between Python's last look at signals and the system call waits for the end of that call.
        for _ in range(600):
            time.sleep(0.05)
vmkit.cli.machines.sweep = sleep
sys.argv = ["vmkit", "list"]
sys.exit(main())
"""


def start_sleeper(*before: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "vmkit: interrupted\n"), (signal.SIGTERM, ""), (signal.SIGHUP, "")]
)
def test_signal_undoes_what_was_begun_and_is_the_status(folders: Path, number: signal.Signals, said: str) -> None:
    with start_sleeper() as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert out == "undoing\nundone\n"
    assert err == said
    assert process.returncode == 128 + number


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_second_signal_does_not_cut_the_undoing_short(folders: Path, second: signal.Signals) -> None:
    with start_sleeper() as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "undoing\n"
        process.send_signal(second)
        out, _ = process.communicate(timeout=30)
    assert out == "undone\n"
    assert process.returncode == 128 + signal.SIGINT


def test_later_signal_counts_again_where_the_first_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops what is raised inside a finalizer."""
    monkeypatch.setattr(program_module, "_stopped_s", -program_module.CLEAN_UP_S)
    with pytest.raises(program_module._Stopped):
        program_module._raise_stopped(signal.SIGINT, None)
    program_module._raise_stopped(signal.SIGINT, None)
    monkeypatch.setattr(program_module, "CLEAN_UP_S", 0.0)
    with pytest.raises(program_module._Stopped):
        program_module._raise_stopped(signal.SIGINT, None)


def test_hang_up_stays_ignored_under_nohup(folders: Path) -> None:
    with start_sleeper("nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_verb_is_imported_only_when_it_is_used() -> None:
    """`vmkit list` must not pay for building images, and no verb for the progress bar of another."""
    script = textwrap.dedent(
        """
        import sys
        from vmkit.cli.main import vmkit
        try: vmkit.main(["list", "--json"], standalone_mode=False)
        finally: print(*(n for n in ("jinja2", "rich", "vmkit.image", "asyncio", "qemu") if n in sys.modules))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_help_groups_the_verbs_and_cuts_no_summary(vmkit: Vmkit) -> None:
    shown = vmkit("--help").out
    assert "..." not in shown.partition("\n")[2]
    assert [line[:-1] for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "Options",
        *TASKS,
    ]
    assert all(f"\n  {verb} " in shown for verb in VERBS)
