"""`vmkit up --record DIR`: vsh records each session of that machine there, asked or not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vsh.conftest import Register
from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd
from tests.vsh.typist import Typist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recordings"


@pytest.fixture
def machine(registry: Register, vshd: Vshd, folder: Path) -> str:
    """A machine that is recorded; its vshd is a real one."""
    registry("web", 7, vsock=str(vshd.path), recordings=str(folder))
    return "web"


def vsh(*words: str, input: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    environment = {**ENVIRONMENT, "VMKIT_RUNTIME_DIR": os.environ["VMKIT_RUNTIME_DIR"]}
    argv = [sys.executable, "-m", "vsh", *words]
    return subprocess.run(argv, check=False, capture_output=True, input=input, env=environment, timeout=DEADLINE_S)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_session_has_a_file_of_its_own(machine: str, folder: Path) -> None:
    for words in (["--vm_name=web"], ["--cid=7"], []):
        done = vsh(*words, "--", "sh", "-c", "cat; exit 3", input=b"secret")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"secret", b"")
    files = sorted(folder.iterdir())
    assert len(files) == 3
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in files:
        assert file.name.startswith("web-20")
        assert file.suffix == ".jsonl"
        assert file.stat().st_mode & 0o777 == 0o600
        header, output, end = read_lines(file)
        assert header["command"] == ["sh", "-c", "cat; exit 3"]
        assert (output["stream"], output["text"]) == ("stdout", "secret")
        assert end["exit"] == 3


def test_terminal_becomes_an_asciicast_beside_the_users_own(machine: str, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    argv = [sys.executable, "-m", "vsh", f"--record={own}", "--vm_name=web", "--", "sh", "-c", "read x; stty size"]
    typist = Typist(argv, env={"VMKIT_RUNTIME_DIR": os.environ["VMKIT_RUNTIME_DIR"]})
    try:
        typist.type(b"\r")
        typist.expect(b"30 100")
        assert typist.wait() == 0
    finally:
        typist.close()
    (file,) = folder.iterdir()
    assert file.suffix == ".cast"
    for path in (file, own):
        header, *lines = read_lines(path)
        assert header["version"] == 3
        assert "30 100" in "".join(line[2] for line in lines if line[1] == "o")
        assert lines[-1][1:] == ["x", "0"]


def test_session_of_no_machine_is_not_recorded(vshd: Vshd, folder: Path) -> None:
    assert vshd.run("--", "true").returncode == 0
    assert not folder.exists()


def test_session_that_does_not_begin_leaves_no_file(machine: str, folder: Path) -> None:
    assert vsh("--vm_name=web", "--", "no-such-program").returncode == 127
    assert list(folder.iterdir()) == []


def test_session_that_lasts_is_recorded_where_it_is_watched(machine: str, folder: Path) -> None:
    done = vsh("--vm_name=web", "--detach", "--", "sh", "-c", "echo kept")
    assert done.returncode == 0, done.stderr
    name = done.stdout.decode().strip()
    assert vsh("--vm_name=web", f"--output={name}", "--follow").stdout == b"kept\n"
    (file,) = folder.iterdir()
    header, output, _ = read_lines(file)
    assert header["command"] == [f"--output={name}"]
    assert output["text"] == "kept\n"


def test_folder_that_takes_no_file_is_a_warning(machine: str, folder: Path) -> None:
    folder.write_text("a file")
    done = vsh("--vm_name=web", "--", "echo", "hi")
    assert (done.returncode, done.stdout) == (0, b"hi\n")
    assert done.stderr.decode() == f"vsh: this session is not recorded into {folder}: File exists\n"
