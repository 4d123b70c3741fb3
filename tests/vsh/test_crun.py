"""Sessions in containers that vmkit made: what the guest's script finds out, and what it gives to crun."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.vsh.live import Vshd
from vsh.crun import FRAGMENT_BYTES_MAX, FUNCTIONS, SCRIPT, check_name, enter_container
from vsh.errors import UsageError
from vshd.wire.messages import SetupConnectionRequest

PASSWD = """root:x:0:0:root:/root:/bin/bash
# a comment
ann:x:1001:1001::/home/ann:/bin/zsh
77:x:1002:1002::/home/77:/bin/sh
bad:x:0x3:0::/:/bin/sh
quote:x:1003:1003::/ho"me:/bin/sh
"""
GROUP = "root:x:0:\nann:x:1001:\nvideo:x:44:bob,ann\naudio:x:29:joann\ndisk:x:6:ann\n"
# It prints what it was asked for, and the description that it was given.
CRUN = '#!/bin/sh\necho "$2 $3 $5 $7"\ncat "$6"\nread -r line && echo "input: $line"\nexit 7\n'
# It fails as crun does: with the reason in its log and on its standard error.
BROKEN_CRUN = '#!/bin/sh\necho "%s" | tee "${1#--log=}" >&2\nexit 255\n'
# It waits for the signal that its shell gets as well.
DEAF_CRUN = '#!/bin/sh\ntrap "echo caught; exit 3" %s\nkill -%s "$PPID"\nkill -%s $$\necho lost\n'


class Guest:
    """A guest's file system below a folder: the script's places are in it, and crun is a script."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.container = folder / "lib/vmkit/containers/web"
        self.etc = self.container / "root/etc"
        self.etc.mkdir(parents=True)
        (self.etc / "passwd").write_text(PASSWD)
        (self.etc / "group").write_text(GROUP)
        for name, text in (("user", ""), ("cwd", ""), ("env", '"PATH=/bin","A=image"'), ("rest", '"rest":1')):
            (self.container / name).write_text(f"{text}\n")
        self.events = folder / "cgroup/web/cgroup.events"
        self.events.parent.mkdir(parents=True)
        self.events.write_text("populated 1\nfrozen 0\n")
        (folder / "bin").mkdir()
        self.crun = folder / "bin/crun"
        self.crun.write_text(CRUN)
        self.crun.chmod(0o755)

    def run(self, request: SetupConnectionRequest, container: str = "web") -> "subprocess.CompletedProcess[str]":
        enter_container(request, container, "lab")
        script = SCRIPT
        places = (
            # The folder may be on an overlay.
            *(("/run/vmkit/containers", "lib/vmkit/containers"), ("/var/lib", "lib")),
            *(("/sys/fs/cgroup/vmkit", "cgroup"), ("/run/vmkit-process", "process")),
        )
        for place, name in places:
            assert place in script
            script = script.replace(place, f"{self._folder}/{name}")
        argv = [os.fsdecode(word) for word in request.argv]
        assert argv[2] == SCRIPT
        argv[2] = script
        env = {**request.env, b"PATH": f"{self._folder}/bin:{os.environ['PATH']}".encode()}
        return subprocess.run(argv, env=env, input="hello\n", capture_output=True, text=True, check=False, timeout=30)

    def describe(self, request: SetupConnectionRequest) -> dict[str, object]:
        """The process that crun is to start."""
        done = self.run(request)
        assert done.returncode == 7, done.stderr
        words, description, line = done.stdout.splitlines()
        assert words == "exec --pid-file --process web"
        # crun has the session's own standard input.
        assert line == "input: hello"
        found = json.loads(description)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def ask(*words: str, user: str = "", cwd: str = "", **env: str) -> SetupConnectionRequest:
    return SetupConnectionRequest(
        argv=[word.encode() for word in words],
        user=user.encode(),
        cwd=cwd.encode(),
        env={key.encode(): value.encode() for key, value in env.items()},
        nopty=True,
    )


def test_command_keeps_its_words_and_its_variables(guest: Guest) -> None:
    words = ("sh", "-c", 'echo "$1"\n\'', "two words", "\\", "", "ü")
    found = guest.describe(ask(*words, A="own $HOME", B='"'))
    assert found["args"] == list(words)
    assert found["terminal"] is False
    env = found["env"]
    assert isinstance(env, list)
    # The last one of a name counts.
    assert env[-4:] == ["PATH=/bin", "A=image", "A=own $HOME", 'B="']
    assert env[:2] == ["HOME=/root", "USER=root"]
    # What all processes of the container have alike.
    assert found["rest"] == 1


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, [0])),
        ("root", (0, 0, [0])),
        ("ann", (1001, 1001, [1001, 44, 6])),
        ("1001", (1001, 1001, [1001, 44, 6])),
        ("ann:44", (1001, 44, [44])),
        ("ann:disk", (1001, 6, [6])),
        # Digits are a name first.
        ("77", (1002, 1002, [1002])),
        ("4000", (4000, 0, [0])),
        ("4000:5", (4000, 5, [5])),
    ],
)
def test_user_is_looked_up_in_the_container(guest: Guest, user: str, expected: tuple[int, int, list[int]]) -> None:
    found = guest.describe(ask("id", user=user))["user"]
    assert found == dict(zip(("uid", "gid", "additionalGids"), expected, strict=True))


def test_images_user_and_directory_are_the_defaults(guest: Guest) -> None:
    (guest.container / "user").write_text("ann\n")
    (guest.container / "cwd").write_text('"/srv"\n')
    found = guest.describe(ask("id"))
    assert (found["cwd"], found["user"]) == ("/srv", {"uid": 1001, "gid": 1001, "additionalGids": [1001, 44, 6]})
    assert guest.describe(ask("id", cwd="/tmp"))["cwd"] == "/tmp"


def test_without_any_directory_the_home_counts(guest: Guest) -> None:
    assert guest.describe(ask("id", user="ann"))["cwd"] == "/"
    (guest.container / "root/home/ann").mkdir(parents=True)
    assert guest.describe(ask("id", user="ann"))["cwd"] == "/home/ann"


def test_no_command_is_the_users_shell(guest: Guest) -> None:
    assert guest.describe(ask(user="ann"))["args"] == ["/bin/zsh", "-l"]
    assert guest.describe(ask(user="4000"))["args"] == ["/bin/sh", "-l"]


@pytest.mark.parametrize("user", ["bob", "bad", "ann:nobody", "0x1", "*", "$(id)"])
def test_unknown_user_is_refused(guest: Guest, user: str) -> None:
    done = guest.run(ask("id", user=user))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vsh: the container 'web' has no ")


def test_entry_that_would_change_the_description_is_refused(guest: Guest) -> None:
    done = guest.run(ask("id", user="quote"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "unfit entry" in done.stderr


@pytest.mark.parametrize("kind", ["link", "folder link", "fifo", "missing"])
def test_users_file_that_is_no_file_of_the_container_counts_as_none(guest: Guest, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("ann:x:5:5::/:/bin/sh\n")
    (guest.etc / "passwd").unlink()
    match kind:
        case "link":
            (guest.etc / "passwd").symlink_to(outside / "passwd")
        case "folder link":
            (guest.etc / "group").unlink()
            guest.etc.rmdir()
            guest.etc.symlink_to(outside)
        case "fifo":
            os.mkfifo(guest.etc / "passwd")
    done = guest.run(ask("id", user="ann"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no user 'ann'" in done.stderr
    assert guest.describe(ask("id"))["user"] == {"uid": 0, "gid": 0, "additionalGids": [0]}


def test_stopped_and_unknown_containers_are_named(guest: Guest) -> None:
    guest.events.write_text("populated 0\nfrozen 0\n")
    done = guest.run(ask("id"))
    assert done.returncode == 1
    assert done.stderr == "vsh: the container 'web' is not running\nhint: vmkit container lab start web\n"
    done = guest.run(ask("id"), container="shop")
    assert done.returncode == 1
    assert done.stderr.startswith("vsh: lab has no container 'shop'\n")


def test_guest_without_room_is_told_and_nothing_is_left(guest: Guest, tmp_path: Path) -> None:
    full = tmp_path / "process.full"
    mktemp = tmp_path / "bin/mktemp"
    mktemp.write_text(f"#!/bin/sh\nln -s /dev/full {full} && echo {full}\n")
    mktemp.chmod(0o755)
    done = guest.run(ask("id"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vsh: the guest has no room for a file in /run\n"
    assert not full.is_symlink()


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        ("executable file 'x' not found in PATH: No such file or directory", 127),
        ("executable file '/x' not found: No such file or directory", 127),
        # The program's own interpreter is missing.
        ("exec: No such file or directory", 127),
        ("open executable: Permission denied", 126),
        ("the path '/etc/passwd' exists but it is not executable: Operation not permitted", 126),
        ("exec: Exec format error", 126),
        # None of these is about the program.
        ("chdir to '/executable not found': No such file or directory", 255),
        ("error opening file '/run/crun/web/status': No such file or directory", 255),
    ],
)
def test_program_that_cannot_run_ends_with_the_status_of_a_shell(guest: Guest, trouble: str, status: int) -> None:
    guest.crun.write_text(BROKEN_CRUN % trouble)
    done = guest.run(ask("x"))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"{trouble}\n")


def test_status_of_a_program_is_its_own(guest: Guest, tmp_path: Path) -> None:
    guest.crun.write_text('#!/bin/sh\n: > "${1#--log=}"\necho exec: mine >&2\nexit 255\n')
    done = guest.run(ask("x"))
    assert (done.returncode, done.stderr) == (255, "exec: mine\n")
    assert not list(tmp_path.glob("process*.log"))


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM", "USR1", "35"])
def test_signal_for_the_session_leaves_its_end_to_crun(guest: Guest, name: str) -> None:
    guest.crun.write_text(DEAF_CRUN % (name, name, name))
    done = guest.run(ask("x"))
    assert (done.returncode, done.stdout) == (3, "caught\n")


def test_guest_may_lack_every_folder_of_the_store() -> None:
    script = FUNCTIONS.replace("/var/lib", "/no-such-folder/lib") + 'find_store\necho "$store"'
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout.endswith("/vmkit/containers\n")


def test_request_that_no_container_can_have_is_refused() -> None:
    for request in (
        SetupConnectionRequest(argv=[b"\xff"]),
        SetupConnectionRequest(argv=[b"a\0b"]),
        SetupConnectionRequest(env={b"A": b"x" * FRAGMENT_BYTES_MAX}),
        SetupConnectionRequest(cwd_pid=1),
    ):
        with pytest.raises(UsageError):
            enter_container(request, "web", "lab")


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "a" * 64, "../a", "a\n"])
def test_name_that_no_container_can_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="crun is root's")
def test_machine_without_such_a_container_is_told_by_its_vshd(vshd: Vshd) -> None:
    done = vshd.run("--target_container=no-such-container", "--", "true")
    assert done.returncode == 1
    assert b"has no crun" in done.stderr or b"has no container 'no-such-container'" in done.stderr


def test_subsystem_is_not_served_in_a_container(vshd: Vshd) -> None:
    done = vshd.run("--target_container=web", "--subsystem=sftp")
    assert done.returncode != 0
    assert b"--subsystem serves the guest" in done.stderr
