"""vsh --record: what a session's terminal or pipes took, with times, in a file that others can play."""

import base64
import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vsh.live import DEADLINE_S, Vshd, wait_until
from tests.vsh.typist import typing
from vsh.record import Cast, StreamLog


def read_lines(path: Path) -> list[Any]:
    text = path.read_text()
    assert text.endswith("\n")
    assert path.stat().st_mode & 0o777 == 0o600
    return [json.loads(line) for line in text.splitlines()]


def join(lines: list[Any], code: str) -> str:
    return "".join(line[2] for line in lines[1:] if line[1] == code)


def test_streams_become_a_log(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    script = "cat; echo err >&2; printf '\\377'; exit 7"
    done = vshd.run(f"--record={file}", "--record_input", "--", "sh", "-c", script, input=b"typed\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"typed\n\xff", b"err\n")
    header, *lines = read_lines(file)
    assert header["vsh_log"] == 1
    assert header["command"] == ["sh", "-c", script]
    assert lines[-1]["exit"] == 7
    data = {"stdin": b"", "stdout": b"", "stderr": b""}
    for line in lines[:-1]:
        data[line["stream"]] += line["text"].encode() if "text" in line else base64.b64decode(line["base64"])
    assert data == {"stdin": b"typed\n", "stdout": b"typed\n\xff", "stderr": b"err\n"}
    times = [line["t"] for line in lines]
    assert times == sorted(times)


@given(st.text(), st.floats(0, 1e6))
def test_any_text_is_what_json_reads(text: str, at_s: float) -> None:
    line = StreamLog([], 0.0).render_data("stdout", text.encode("utf-8", "surrogatepass"), at_s)
    assert line.endswith("}\n") and "\n" not in line[:-1]
    content = json.loads(line)
    assert (content["stream"], content["t"]) == ("stdout", round(at_s, 6))
    if "text" in content:
        assert content["text"] == text
    else:
        assert base64.b64decode(content["base64"]) == text.encode("utf-8", "surrogatepass")


def test_zeros_do_not_blow_a_log_up(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    done = vshd.run(f"--record={file}", "--", "head", "-c", "300000", "/dev/zero")
    assert len(done.stdout) == 300_000
    assert file.stat().st_size < 450_000
    _, *lines, _ = read_lines(file)
    assert b"".join(base64.b64decode(line["base64"]) for line in lines) == done.stdout


def test_input_is_not_recorded_unless_asked_for(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    vshd.run(f"--record={file}", "--", "sh", "-c", "cat >/dev/null", input=b"a secret")
    assert "secret" not in file.read_text()


@pytest.mark.parametrize("version", [3, 2])
def test_terminal_becomes_an_asciicast(vshd: Vshd, tmp_path: Path, version: int) -> None:
    file = tmp_path / "cast"
    flags = [f"--record={file}", "--record_input", *(["--record_format=asciicast-v2"] if version == 2 else [])]
    script = "echo ready; read word; echo got $word; read x; stty size; exit 5"
    with typing(vshd, *flags, "--", "sh", "-c", script) as typist:
        typist.expect(b"ready")
        typist.type("größe\r".encode())
        typist.expect("got größe".encode())
        typist.resize(41, 123)
        wait_until(lambda: '"123x41"' in file.read_text(), "the new size is recorded")
        typist.type(b"\r")
        typist.expect(b"41 123")
        assert typist.wait() == 5
    header, *lines = read_lines(file)
    assert header["version"] == version
    size = (header["term"]["rows"], header["term"]["cols"]) if version == 3 else (header["height"], header["width"])
    assert size == (30, 100)
    output, typed = join([header, *lines], "o"), join([header, *lines], "i")
    assert "ready\r\n" in output
    assert "got größe\r\n" in output
    assert typed == "größe\r\r"
    assert [line[2] for line in lines if line[1] == "r"] == ["123x41"]
    assert lines[-1][1:] == (["x", "5"] if version == 3 else ["m", "exit 5"])
    assert all(line[0] >= 0 for line in lines)
    if version == 2:
        assert [line[0] for line in lines] == sorted(line[0] for line in lines)


def test_player_plays_it(vshd: Vshd, tmp_path: Path) -> None:
    """asciinema of Debian, as an independent reader; it knows version 2."""
    file = tmp_path / "cast"
    script = "printf '\\033[1mbold\\033[m größe'; exit 3"
    with typing(vshd, f"--record={file}", "--record_format=asciicast-v2", "--", "sh", "-c", script) as typist:
        assert typist.wait() == 3
    # It wants a terminal of its own.
    player = ["script", "-qec", f"asciinema cat {file}", "/dev/null"]
    environment = {**os.environ, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    played = subprocess.run(player, capture_output=True, stdin=subprocess.DEVNULL, env=environment, check=True)
    assert played.stdout == "\033[1mbold\033[m größe".encode()


def test_character_that_is_cut_is_recorded_whole() -> None:
    cast = Cast(3, 24, 80, "", 0.0)
    data = "\N{LATIN SMALL LETTER O WITH DIAERESIS}\N{PILE OF POO}".encode() + b"\xff."
    lines = [cast.render_data("stdout", data[at : at + 1], at / 10) for at in range(len(data))]
    shown = [json.loads(line) for line in lines if line]
    assert "".join(line[2] for line in shown) == "ö💩\N{REPLACEMENT CHARACTER}."
    # The times are since the line before.
    assert sum(line[0] for line in shown) == pytest.approx((len(data) - 1) / 10)


def test_command_of_any_bytes_leaves_a_file_of_utf8(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    vshd.run(f"--record={file}", "--", "echo", "\udcff")
    assert read_lines(file)[0]["command"] == ["echo", "?"]


def test_bulk_is_recorded_whole(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    done = vshd.run(f"--record={file}", "--", "sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x")
    assert done.stdout == b"x" * 5_000_000
    assert sum(len(line["text"]) for line in read_lines(file)[1:-1]) == 5_000_000


def test_lost_session_has_its_reason(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    process = vshd.start(f"--record={file}", "--", "sh", "-c", "echo here; sleep 97", stdout=subprocess.PIPE)
    wait_until(lambda: file.exists() and "here" in file.read_text(), "the output is recorded")
    for pid in vshd.children():
        os.kill(pid, 9)
    assert process.wait(DEADLINE_S) == 123
    process.communicate()
    last = read_lines(file)[-1]
    assert last["exit"] == 123
    assert last["reason"]


def test_full_disk_ends_the_recording_and_not_the_session(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        done = vshd.run(f"--record={file}", "--", "sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x; echo; exit 3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.returncode, len(done.stdout)) == (3, 100_001)
    assert f"vsh: the recording {file} ends early: File too large" in done.stderr.decode()
    # Whole lines, as far as it goes.
    read_lines(file)


def test_file_that_exists_is_not_touched(vshd: Vshd, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("mine")
    done = vshd.run(f"--record={file}", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 64
    assert f"--record writes no file that exists: {file}" in done.stderr.decode()
    assert file.read_text() == "mine"
    assert not (tmp_path / "ran").exists()


def test_session_that_does_not_begin_leaves_no_file(vshd: Vshd, tmp_path: Path) -> None:
    done = vshd.run(f"--record={tmp_path / 'log'}", "--user=no-such-user", "--", "true")
    assert done.returncode == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--record_input"], "need --record=FILE"),
        (["--record=x", "--record_format=gif"], "--record_format must be asciicast-v3, asciicast-v2, log, not 'gif'"),
        (["--record=x", "--record_format=asciicast-v3"], "asciicast-v3 is for sessions with a terminal"),
        (["--record=x", "--proxy=22"], "--record is for sessions, not for --proxy"),
        (["--record=x", "--sessions"], "not to --sessions"),
    ],
)
def test_wrong_use_is_refused(vshd: Vshd, tmp_path: Path, flags: list[str], complaint: str) -> None:
    words = [] if "--proxy=22" in flags or "--sessions" in flags else ["--", "true"]
    file = tmp_path / "x"
    done = vshd.run(*(f"--record={file}" if flag == "--record=x" else flag for flag in flags), *words)
    assert done.returncode == 64
    assert complaint in done.stderr.decode()
    assert not file.exists()
