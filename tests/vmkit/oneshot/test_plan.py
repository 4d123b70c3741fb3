"""What docker's words become: the entry point and the command, variables and directory of an image and a user."""

import pytest

from vmkit.errors import ConfigError
from vmkit.oneshot.execute import MACHINE_FAILED, find_status, make_request
from vmkit.oneshot.plan import Command, Wishes, plan_command, take_words
from vmkit.roots.settings import ContainerSettings
from vsh.errors import ConnectionLost, ExecError
from vsh.interactive import TerminalGone
from vsh.pump import SinkGone
from vsh.shell import Interrupted
from vshd.wire import messages

IMAGE = ContainerSettings(("PATH=/bin", "A=image", "odd", "=x"), "/srv", "app", ("/entry", "-x"), ("serve", "80"))


def plan(wishes: Wishes, image: ContainerSettings | None = IMAGE, *, has_shell: bool = False) -> Command:
    return plan_command(image, wishes, "docker://web", has_shell=has_shell)


@pytest.mark.parametrize(
    ("entrypoint", "words", "argv"),
    [
        (None, (), ("/entry", "-x", "serve", "80")),
        (None, ("ls", "-l"), ("/entry", "-x", "ls", "-l")),
        # --entrypoint takes Cmd away with the image's own, which that was made for.
        ("sh", (), ("sh",)),
        ("sh", ("-c", "true"), ("sh", "-c", "true")),
        ("", ("ls",), ("ls",)),
    ],
)
def test_entry_point_and_command_are_dockers(entrypoint: str | None, words: tuple[str, ...], argv: tuple[str]) -> None:
    assert plan(Wishes(words, entrypoint)).argv == argv


def test_words_of_the_user_come_before_those_of_the_image() -> None:
    assert plan(Wishes()) == Command(("/entry", "-x", "serve", "80"), {"PATH": "/bin", "A": "image"}, "/srv", "app")
    wishes = Wishes(assignments=(("A", "user"), ("B", "b=c"), ("PATH", None)), working_dir="/tmp", user="5:6")
    command = plan(wishes)
    assert (command.env, command.working_dir, command.user) == ({"A": "user", "B": "b=c"}, "/tmp", "5:6")


def test_image_without_a_command_asks_for_one() -> None:
    for image, what in ((ContainerSettings(env=("A=b",)), "the image"), (None, "this root")):
        with pytest.raises(ConfigError, match=f"{what} names no command to run: docker://web") as caught:
            plan(Wishes(), image)
        assert caught.value.hint == "give one: vmkit run docker://web COMMAND"
        assert plan(Wishes(("ls",)), image).argv == ("ls",)
    with pytest.raises(ConfigError, match="names no command"):
        plan(Wishes(entrypoint=""))


def test_image_of_vmkits_own_has_a_login_shell() -> None:
    assert plan(Wishes(), None, has_shell=True) == Command((), {}, "", "")


def test_directory_is_an_absolute_path() -> None:
    with pytest.raises(ConfigError, match="--workdir must be an absolute path, not 'srv'"):
        plan(Wishes(working_dir="srv"))


def test_dashes_before_the_command_are_no_part_of_it() -> None:
    assert take_words(("--", "ls", "--")) == ("ls", "--")
    assert take_words(("ls", "--", "-l")) == ("ls", "--", "-l")
    assert take_words(()) == ()


def test_other_sessions_of_the_machine_get_what_the_command_gets() -> None:
    settings = plan(Wishes(("ls",), assignments=(("B", "b"),))).make_settings()
    assert settings == ContainerSettings(("PATH=/bin", "A=image", "B=b"), "/srv", "app", (), ("/entry", "-x", "ls"))


def test_request_has_a_terminal_where_it_is_wished() -> None:
    command = Command(("ls",), {"A": "b"}, "/srv", "5:6")
    request = make_request(command, {"TERM": "vt100"}, has_terminal=False)
    assert (request.argv, request.cwd, request.user, request.nopty) == ([b"ls"], b"/srv", b"5:6", True)
    assert (request.env, request.keeps_env) == ({b"A": b"b"}, True)
    request = make_request(command, {"TERM": "vt100"}, has_terminal=True)
    assert (request.nopty, request.env[b"TERM"]) == (False, b"vt100")
    assert request.window_rows > 0 and request.window_cols > 0
    assert make_request(command, {}, has_terminal=True).env[b"TERM"] == b"xterm"
    assert make_request(Command((), {"TERM": "dumb"}, "", ""), {}, has_terminal=True).env[b"TERM"] == b"dumb"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ExecError("", kind=messages.NOT_FOUND, status=127), 127),
        (ExecError("", kind=messages.NOT_EXECUTABLE, status=126), 126),
        (ExecError("", kind=messages.BAD_USER), MACHINE_FAILED),
        (ExecError("", kind=messages.BAD_DIRECTORY), MACHINE_FAILED),
        (ConnectionLost(""), MACHINE_FAILED),
        (ConfigError(""), MACHINE_FAILED),
        (Interrupted("", status=130), 130),
        (TerminalGone("", status=129), 129),
        (SinkGone("", status=141), 141),
    ],
)
def test_status_of_an_error_is_dockers(error: ConnectionLost, status: int) -> None:
    assert find_status(error) == status
