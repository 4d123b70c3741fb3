"""`vmkit cp` with a real vshd behind a machine of the registry."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import DEADLINE_S, Program, Vmkit
from tests.vmkit.cli.test_completion import complete
from tests.vmkit.forward.test_forward import FakeMachine
from tests.vsh.live import DEFAULT_USER, Vshd
from vmkit.cli.bashwords import join_words

# vshd's own port, in the table of the fake machine.
PORT = 9001
OWN = ["--user", DEFAULT_USER]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vshd]:
    running = Vshd(tmp_path_factory.mktemp("vshd"))
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def machine(folders: Path, server: Vshd) -> Iterator[FakeMachine]:
    """The machine `m` with CID 3."""
    fake = FakeMachine(folders / "runtime", "m", 3, {PORT: str(server.path)})
    yield fake
    fake.end()


def test_file_goes_in_and_out(vmkit: Vmkit, machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("data")
    done = vmkit("cp", *OWN, str(tmp_path / "in"), f"m:{tmp_path}/there")
    assert (done.status, done.out, done.err) == (0, "", "")
    for word in ("m", "3", ""):
        done = vmkit("cp", "-r", "--fsync", *OWN, f"{word}:{tmp_path}/there", f"{tmp_path}/back{word}")
        assert (done.status, done.err) == (0, "")
        assert (tmp_path / f"back{word}").read_text() == "data"


def test_summary_is_json(vmkit: Vmkit, machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_text("data")
    (tmp_path / "t" / "l").symlink_to("f")
    os.mkfifo(tmp_path / "t" / "p")
    done = vmkit("cp", "--json", *OWN, f"m:{tmp_path}/t", str(tmp_path / "back"))
    value = json.loads(done.out)
    check_form("cp", value)
    seconds = value.pop("seconds")
    assert 0 < seconds < DEADLINE_S
    skipped = [f"m:{tmp_path}/t/p"]
    assert value == {"files": 1, "directories": 1, "links": 1, "bytes": 4, "whole": 1, "skipped": skipped, "failed": 0}
    assert done.err == f"vmkit: warning: skipped {skipped[0]}: it is a device, a socket or a FIFO\n"


def test_verbose_copy_names_files_and_how_they_went(vmkit: Vmkit, machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_text("data")
    done = vmkit("cp", "-v", *OWN, str(tmp_path / "t"), f"m:{tmp_path}/there")
    assert (done.status, done.out) == (0, "")
    lines = done.err.splitlines()
    assert lines[0] == f"{tmp_path}/t/f -> m:{tmp_path}/there/f"
    assert lines[1] == f"{tmp_path}/t -> m:{tmp_path}/there"
    assert lines[2].startswith("1 files, 4 bytes in ")
    assert lines[2].endswith("; 1 small files went whole in one message")


def test_failure_is_an_error_and_part_of_the_summary(vmkit: Vmkit, machine: FakeMachine, tmp_path: Path) -> None:
    done = vmkit("cp", "--json", *OWN, f"m:{tmp_path}/no\n\x1b[2J", str(tmp_path / "x"))
    assert done.status == 1
    assert done.err == f"vmkit: cannot copy m:{tmp_path}/no : No such file or directory\n"
    check_form("cp", json.loads(done.out))
    assert json.loads(done.out)["failed"] == 1


@pytest.mark.parametrize(
    ("words", "status", "brief"),
    [
        (["a", "b"], 64, "neither a nor b is on a machine"),
        (["m:a"], 64, "needs a source and a destination"),
        (["--json", "m:a", "-"], 64, "--json does not go with `-`"),
        (["-", "m:/"], 64, "standard input needs the name of a file"),
        (["other:a", "b"], 1, "other"),
        (["--user", "nosuchuser", "m:a", "b"], 1, "could not find user: nosuchuser"),
    ],
)
def test_bad_words_are_refused(vmkit: Vmkit, machine: FakeMachine, words: list[str], status: int, brief: str) -> None:
    done = vmkit("cp", *([] if "--user" in words else OWN), *words)
    assert done.status == status, done.err
    assert brief in done.err
    assert done.out == ""


def test_streams_are_sources_and_destinations(program: Program, machine: FakeMachine, tmp_path: Path) -> None:
    data = os.urandom(1_000_001)
    done = program("cp", *OWN, "-", f"m:{tmp_path}/there", input=data)
    assert (done.returncode, done.stderr) == (0, b"")
    done = program("cp", *OWN, f"m:{tmp_path}/there", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_reader_that_leaves_ends_the_copy(program: Program, machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(5_000_000))
    command = f"{sys.executable} -m vmkit cp {' '.join(OWN)} m:{tmp_path}/f - | head -c 10; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.splitlines()[-1][10:] == b"141"
    assert done.stderr == b""


def show_on_terminal(*words: str) -> tuple[int, bytes]:
    """The status of `vmkit cp`, and what a terminal shows of it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "vmkit", "cp", *words], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    return process.wait(DEADLINE_S), shown


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_terminal_shows_progress(machine: FakeMachine, tmp_path: Path, quiet: list[str]) -> None:
    (tmp_path / "f").write_bytes(os.urandom(30_000_000))
    status, shown = show_on_terminal(*quiet, *OWN, str(tmp_path / "f"), f"m:{tmp_path}/there")
    assert status == 0
    if quiet:
        assert shown == b""
    else:
        assert b"of 1 files" in shown
        assert b"MB" in shown


def test_content_has_the_terminal_for_itself(machine: FakeMachine, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content\n")
    assert show_on_terminal(*OWN, f"m:{tmp_path}/f", "-") == (0, b"content\r\n")


def test_words_are_completed(machine: FakeMachine, folders: Path) -> None:
    assert "m:" in complete("cp", "")
    assert complete("cp", "m") >= {"m:"}


def test_paths_on_a_machine_are_completed(machine: FakeMachine, tmp_path: Path) -> None:
    """vshd's default user is that of this test. Names that a shell would give a meaning are left out."""
    for name in ("one", "other.txt", "odd; touch x", "$(x)", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "open").mkdir()
    wanted = {f"{tmp_path}/{name}" for name in ("one", "other.txt", "open/")}
    assert complete("cp", f"m:{tmp_path}/o") == {f"m:{path}" for path in wanted}
    assert complete("sync", f"3:{tmp_path}/ot") == {f"3:{tmp_path}/other.txt"}
    assert complete("cp", f":{tmp_path}/.h") == {f":{tmp_path}/.hidden"}
    # As bash splits them. Its answers begin behind the colon.
    assert complete("cp", "m", ":", f"{tmp_path}/o") == wanted
    assert complete("sync", "here", "m", ":", f"{tmp_path}/ot") == {f"{tmp_path}/other.txt"}
    for path in (f"m:{tmp_path}/no/where/", "gone:/", f"m:{tmp_path}/one/"):
        assert complete("cp", path) == set()


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("vmkit cp a", (["vmkit", "cp"], "a", "")),
        ("vmkit cp m :", (["vmkit", "cp"], "m:", "m:")),
        ("vmkit cp m : /e", (["vmkit", "cp"], "m:/e", "m:")),
        ("vmkit cp m : /e b", (["vmkit", "cp", "m:/e"], "b", "")),
        ("vmkit cp a : /e", (["vmkit", "cp", "a"], ":/e", ":")),
    ],
)
def test_words_of_bash_are_joined(words: str, joined: tuple[list[str], str, str]) -> None:
    assert join_words(words.split(), len(words.split()) - 1, "m".__eq__) == joined


def test_help_names_the_grammar(vmkit: Vmkit) -> None:
    text = vmkit("cp", "--help").out
    for word in ("NAME:PATH", ":PATH", "./a:b", "--owners"):
        assert word in text
