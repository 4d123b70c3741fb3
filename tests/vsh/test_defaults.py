"""A machine of a container image: sessions have its user, directory and variables, unless they name others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.conftest import Register
from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd
from vsh.address import find_by_name
from vsh.client import Client
from vsh.defaults import parse_variables

SHOW = ("--", "sh", "-c", 'echo "$GREETING,$PATH,$HOME"; pwd')


@pytest.fixture
def machine(registry: Register, vshd: Vshd, tmp_path: Path) -> Path:
    """The machine `web`; its image's directory."""
    folder = tmp_path / "app"
    folder.mkdir()
    env = ["PATH=/opt/bin:/usr/bin:/bin", "GREETING=hello", "HOME=/nonexistent", "no variable", "=x"]
    settings: dict[str, object] = {"env": env, "working_dir": str(folder), "user": "", "entrypoint": [], "cmd": []}
    registry("web", 7, vsock=str(vshd.path), container=settings)
    return folder


def vsh(*words: str) -> "subprocess.CompletedProcess[bytes]":
    environment = {**ENVIRONMENT, "VMKIT_RUNTIME_DIR": os.environ["VMKIT_RUNTIME_DIR"]}
    argv = [sys.executable, "-m", "vsh", *words]
    return subprocess.run(
        argv, check=False, capture_output=True, stdin=subprocess.DEVNULL, env=environment, timeout=DEADLINE_S
    )


@pytest.mark.parametrize("where", [["--vm_name=web"], ["--cid=7"], []])
def test_session_has_what_the_image_says(machine: Path, where: list[str]) -> None:
    done = vsh(*where, *SHOW)
    assert done.stdout.decode().splitlines() == [
        "hello,/opt/bin:/usr/bin:/bin,/nonexistent",
        str(machine),
    ], done.stderr


def test_words_of_the_session_come_first(machine: Path) -> None:
    done = vsh("--env=GREETING=bye", "--env=HOME=/home/me", "--cwd=/", *SHOW)
    assert done.stdout == b"bye,/opt/bin:/usr/bin:/bin,/home/me\n/\n"


def test_programs_in_python_and_sessions_that_last_have_it_too(machine: Path) -> None:
    client = Client(find_by_name("web"))
    assert client.run(SHOW[1:], text=True).stdout.splitlines()[1] == str(machine)
    assert client.run(["pwd"], cwd="/", text=True).stdout == "/\n"
    process = client.start(["sh", "-c", "echo $GREETING; pwd"])
    assert process.wait(DEADLINE_S) == 0
    assert process.read().stdout.decode().splitlines() == ["hello", str(machine)]
    process.forget()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_user_of_the_image_is_that_of_all_sessions(registry: Register, vshd: Vshd) -> None:
    settings: dict[str, object] = {"env": [], "working_dir": "/", "user": "5:6", "entrypoint": [], "cmd": []}
    registry("web", 7, vsock=str(vshd.path), container=settings)
    assert vsh("--", "sh", "-c", "id -u; id -G; pwd").stdout == b"5\n6\n/\n"
    assert vsh("--user=0", "--", "id", "-u").stdout == b"0\n"
    # Whoever starts one finds it by its name again.
    assert vsh("--detach=mine", "--", "sh", "-c", "id -u").returncode == 0
    assert vsh("--wait=mine").returncode == 0
    assert vsh("--output=mine").stdout == b"5\n"
    assert b"mine" in vsh("--sessions").stdout
    assert vsh("--forget=mine").returncode == 0


def test_machine_of_no_image_is_as_before(registry: Register, vshd: Vshd) -> None:
    registry("web", 7, vsock=str(vshd.path))
    done = vsh("--env=HOME=/nonexistent", "--", "sh", "-c", "echo $HOME; pwd")
    home, directory = done.stdout.decode().splitlines()
    assert home == directory != "/nonexistent"


@pytest.mark.parametrize("container", [{}, {"env": "A=b"}, {"env": [5, None]}, {"user": 5, "working_dir": []}])
def test_record_of_another_form_changes_nothing(registry: Register, vshd: Vshd, container: dict[str, object]) -> None:
    registry("web", 7, vsock=str(vshd.path), container=container)
    assert vsh("--", "true").returncode == 0


def test_last_variable_of_a_name_counts() -> None:
    assert parse_variables(["A=1", "A=2=3", "B=", "C", "=4"]) == {b"A": b"2=3", b"B": b""}
