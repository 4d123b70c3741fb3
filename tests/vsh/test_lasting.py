"""Sessions that outlive their clients: `vsh --detach` and what brings one back to them, with a real vshd."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vsh.live import (
    DEADLINE_S,
    IS_VSOCK_GUEST,
    StartVshd,
    Vshd,
    ended,
    is_alive,
    read_line,
    wait_for_end,
    wait_until,
)
from tests.vsh.typist import typing

# Prints a line for each line of its input, and ends with a status of its own.
ECHO = 'while read line; do echo "got $line"; [ "$line" = end ] && exit 3; done'


def detach(vshd: Vshd, *words: str) -> str:
    done = vshd.run("--detach", *words)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert re.fullmatch(r"[0-9a-f]{8}\n", text)
    return text.strip()


def look(vshd: Vshd, session: str) -> dict[str, object]:
    """What the list has of one session."""
    records = json.loads(vshd.run("--sessions", "--json").stdout)
    check_form("lasting", records)
    (record,) = [record for record in records if session in (record["id"], record["name"])]
    assert isinstance(record, dict)
    return record


def test_command_outlives_its_client_and_its_status_can_be_asked_for_again(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sh", "-c", "echo out; echo err >&2; exit 5")
    for _ in range(2):
        assert vshd.run(f"--wait={session}").returncode == 5
        done = vshd.run(f"--output={session}")
        assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 0)
    record = look(vshd, session)
    assert (record["state"], record["exit"], record["signal"]) == ("ended", 5, 0)
    assert vshd.run(f"--forget={session}").returncode == 0
    for verb in ("--wait", "--output", "--forget", "--attach"):
        done = vshd.run(f"{verb}={session}")
        assert done.returncode == 1
        assert f"no session has the id or name '{session}'".encode() in done.stderr


def test_input_comes_from_several_clients_and_a_name_serves(vshd: Vshd) -> None:
    vshd.run("--detach=lines", "--", "sh", "-c", ECHO)
    for text in (b"one\n", b"two\n"):
        assert vshd.run("--input=lines", input=text).returncode == 0
    assert look(vshd, "lines")["state"] == "running"
    vshd.run("--input", "lines", input=b"end\n")
    done = vshd.run("--output=lines", "--follow")
    assert done.stdout == b"got one\ngot two\ngot end\n"
    assert vshd.run("--wait=lines").returncode == 3
    again = vshd.run("--detach=lines", "--", "true")
    assert again.returncode == 1
    assert b"a session has the name 'lines' already" in again.stderr
    vshd.run("--forget=lines")
    assert vshd.run("--detach=lines", "--", "true").returncode == 0


def test_end_of_input_reaches_the_command_only_when_asked(vshd: Vshd) -> None:
    session = detach(vshd, "--", "cat")
    vshd.run(f"--input={session}", input=b"a")
    assert look(vshd, session)["state"] == "running"
    assert vshd.run(f"--input={session}", "--eof", input=b"b").returncode == 0
    assert vshd.run(f"--wait={session}").returncode == 0
    assert vshd.run(f"--output={session}").stdout == b"ab"
    late = vshd.run(f"--input={session}", input=b"c")
    assert late.returncode == 1
    assert b"the session has ended" in late.stderr


def test_client_that_comes_back_gets_the_rest_or_is_told_what_is_gone(vshd: Vshd) -> None:
    session = detach(vshd, "--output_size=64K", "--", "sh", "-c", "seq 1 20000")
    whole = b"".join(b"%d\n" % number for number in range(1, 20001))
    vshd.run(f"--wait={session}")
    kept = look(vshd, session)
    assert (kept["output_start"], kept["output_end"]) == (len(whole) - 65536, len(whole))
    done = vshd.run(f"--output={session}")
    assert done.stdout == whole[-65536:]
    dropped = len(whole) - 65536
    assert f"{dropped} bytes of output before offset {dropped} were not kept".encode() in done.stderr
    done = vshd.run(f"--output={session}", f"--since={len(whole) - 6}", "-v")
    assert done.stdout == whole[-6:]
    assert f"the output goes on at offset {len(whole)}".encode() in done.stderr
    assert b"not kept" not in done.stderr


def test_output_can_be_recorded(vshd: Vshd, tmp_path: Path) -> None:
    session = detach(vshd, "--", "sh", "-c", "echo out; exit 5")
    path = tmp_path / "log"
    assert vshd.run(f"--output={session}", "--follow", f"--record={path}").stdout == b"out\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "out\n" in json.dumps(lines).replace("\\n", "\n")
    refused = vshd.run(f"--wait={session}", f"--record={tmp_path / 'other'}")
    assert refused.returncode == 64
    assert b"--record belongs to a command" in refused.stderr


def test_killed_clients_leave_the_session_alone(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sh", "-c", ECHO)
    with ended(vshd.start(f"--attach={session}", stdin=-1)) as client:
        client.stdin.write(b"first\n")
        client.stdin.flush()
        assert read_line(client.stdout) == "got first"
        client.kill()
    # Its place is free, since the kernel has closed its connection.
    wait_until(lambda: look(vshd, session)["has_writer"] is False, "the writer's place is free")
    with ended(vshd.start(f"--output={session}", "--follow")) as watcher:
        assert read_line(watcher.stdout) == "got first"
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(DEADLINE_S) == 128 + signal.SIGINT
    vshd.run(f"--input={session}", input=b"end\n")
    assert vshd.run(f"--wait={session}").returncode == 3


def test_many_watch_and_one_writes_until_another_steals(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sh", "-c", ECHO)
    with (
        ended(vshd.start(f"--attach={session}", stdin=-1)) as first,
        ended(vshd.start(f"--output={session}", "--follow")) as watcher,
    ):
        first.stdin.write(b"one\n")
        first.stdin.flush()
        assert read_line(first.stdout) == read_line(watcher.stdout) == "got one"
        refused = vshd.run(f"--attach={session}")
        assert refused.returncode == 1
        assert b"another client writes to the session" in refused.stderr
        assert b"--steal" in refused.stderr
        with ended(vshd.start(f"--attach={session}", "--steal", stdin=-1)) as second:
            assert read_line(second.stdout) == "got one"
            assert first.wait(DEADLINE_S) == 123
            assert b"another client has taken the session over" in first.stderr.read()
            second.stdin.write(b"end\n")
            second.stdin.flush()
            assert read_line(second.stdout) == read_line(watcher.stdout) == "got end"
            assert second.wait(DEADLINE_S) == 3
        assert watcher.wait(DEADLINE_S) == 0


def test_signal_reaches_the_session_by_name_and_number(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sh", "-c", "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done")
    with ended(vshd.start(f"--output={session}", "--follow")) as watcher:
        assert read_line(watcher.stdout) == "ready"
        assert vshd.run(f"--signal={session}", "USR1").returncode == 0
        assert read_line(watcher.stdout) == "usr1"
        assert vshd.run("--signal", session, "9").returncode == 0
        assert watcher.wait(DEADLINE_S) == 0
    assert vshd.run(f"--wait={session}").returncode == 128 + 9
    late = vshd.run(f"--signal={session}", "TERM")
    assert late.returncode == 1
    assert b"the session has ended" in late.stderr


def test_running_session_is_not_forgotten(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sleep", "1000")
    done = vshd.run(f"--forget={session}")
    assert done.returncode == 1
    assert b"the session still runs" in done.stderr
    assert f"vsh --signal {session} TERM".encode() in done.stderr
    vshd.run(f"--signal={session}", "KILL")
    vshd.run(f"--wait={session}")
    assert vshd.run(f"--forget={session}").returncode == 0


def test_wait_gives_up_in_time_and_the_session_goes_on(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sleep", "1000")
    done = vshd.run(f"--wait={session}", "--timeout=0.2")
    assert done.returncode == 124
    assert b"the session goes on" in done.stderr
    assert look(vshd, session)["state"] == "running"
    vshd.run(f"--signal={session}", "KILL")


def test_command_that_cannot_run_leaves_no_session(vshd: Vshd) -> None:
    before = json.loads(vshd.run("--sessions", "--json").stdout)
    assert vshd.run("--detach=none", "--", "/no/such/program").returncode == 127
    assert vshd.run("--detach=none", "--cwd=/no/such/folder", "--", "true").returncode == 1
    refused = vshd.run("--detach=none", "--output_file=/no/such/folder/x", "--", "true")
    assert refused.returncode == 1
    assert b"cannot make /no/such/folder/x" in refused.stderr
    for size in ("1", "1000G"):
        refused = vshd.run("--detach=none", f"--output_size={size}", "--", "true")
        assert b"the kept output must be between" in refused.stderr
    assert vshd.run("--detach=-x", "--", "true").returncode == 1
    assert vshd.run("--detach=0123abcd", "--", "true").returncode == 1
    assert json.loads(vshd.run("--sessions", "--json").stdout) == before
    # The name is free.
    assert vshd.run("--detach=none", "--", "true").returncode == 0


@pytest.mark.skipif(IS_VSOCK_GUEST, reason="the file would be the guest's")
def test_output_can_be_kept_in_a_file(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "output"
    session = detach(vshd, f"--output_file={path}", "--", "sh", "-c", "echo out; echo err >&2")
    vshd.run(f"--wait={session}")
    done = vshd.run(f"--output={session}")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert sorted(path.read_text().split()) == ["err", "out"]


@pytest.mark.skipif(IS_VSOCK_GUEST, reason="the keeper is looked for in this system")
def test_keeper_that_was_killed_leaves_no_name(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sleep", "1000")
    target = look(vshd, session)["pid"]
    assert isinstance(target, int)
    keeper = int(Path(f"/proc/{target}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGSTOP)
    table = vshd.run("--sessions").stdout.decode()
    assert re.search(rf"^{session} +- +- +silent +- +0 +-$", table, re.MULTILINE), table
    os.kill(keeper, signal.SIGKILL)
    wait_for_end(keeper)
    assert session not in vshd.run("--sessions").stdout.decode()
    assert not [path for path in (vshd.path.parent / "lasting").iterdir() if session in path.name]
    os.kill(target, signal.SIGKILL)


def test_sessions_outlive_their_vshd_and_the_next_one_finds_them(start_vshd: StartVshd, tmp_path: Path) -> None:
    place = f"--lasting_dir={tmp_path / 'shared'}"
    first = start_vshd(place, ends_sessions=False)
    session = detach(first, "--", "sh", "-c", ECHO)
    first.process.kill()
    first.process.wait()
    second = start_vshd(place)
    second.run(f"--input={session}", input=b"end\n")
    assert second.run(f"--wait={session}").returncode == 3
    first.process.returncode = 0


def test_vshd_that_ends_its_sessions_ends_these_too(start_vshd: StartVshd) -> None:
    vshd = start_vshd()
    session = detach(vshd, "--", "sleep", "1000")
    pid = look(vshd, session)["pid"]
    assert isinstance(pid, int)
    if not IS_VSOCK_GUEST:
        assert is_alive(pid)
    with ended(vshd.start(f"--wait={session}")) as client:
        wait_until(lambda: look(vshd, session)["clients"] == 1, "the client is attached")
        assert vshd.stop() == 0
        assert client.wait(DEADLINE_S) == 123
    assert not is_alive(pid)


def test_number_of_sessions_has_a_limit_and_the_oldest_end_makes_room(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--max_lasting=2")
    running = detach(vshd, "--", "sleep", "1000")
    old = detach(vshd, "--", "true")
    vshd.run(f"--wait={old}")
    also = detach(vshd, "--", "sleep", "1000")
    ids = [record["id"] for record in json.loads(vshd.run("--sessions", "--json").stdout)]
    assert sorted(ids) == sorted([running, also])
    full = vshd.run("--detach", "--", "true")
    assert full.returncode == 1
    assert re.search(rb"2 sessions of \S+ are kept, and all run", full.stderr)


def test_ended_session_is_forgotten_after_a_time(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--lasting_time=0")
    detach(vshd, "--", "true")
    wait_until(lambda: json.loads(vshd.run("--sessions", "--json").stdout) == [], "the session is forgotten")


@pytest.mark.skipif(IS_VSOCK_GUEST or os.geteuid() != 0, reason="needs root, to be two users")
def test_user_reaches_only_own_sessions_and_root_all(start_vshd: StartVshd, tmp_path: Path) -> None:
    vshd = start_vshd()
    session = detach(vshd, "--user=1000:1000", "--cwd=/", "--", "sh", "-c", "id -u; exec sleep 1000")
    for stranger in ("1001:1001", "65534:65534"):
        for words in ([f"--output={session}"], [f"--signal={session}", "KILL"], [f"--attach={session}"]):
            done = vshd.run(f"--user={stranger}", *words)
            assert done.returncode == 1
            assert b"no session has the id or name" in done.stderr
        assert json.loads(vshd.run(f"--user={stranger}", "--sessions", "--json").stdout) == []
    # A name is its user's own.
    assert vshd.run("--detach=mine", "--user=1000:1000", "--", "true").returncode == 0
    assert vshd.run("--detach=mine", "--user=1001:1001", "--", "true").returncode == 0
    assert vshd.run("--user=1000:1000", f"--output={session}").stdout == b"1000\n"
    assert vshd.run(f"--output={session}").stdout == b"1000\n"
    folder = vshd.path.parent / "lasting"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert vshd.run("--user=1000:1000", "--", "ls", str(folder)).returncode != 0
    assert vshd.run(f"--signal={session}", "KILL").returncode == 0


@pytest.mark.skipif(IS_VSOCK_GUEST, reason="the folder would be the guest's")
def test_folder_that_others_can_enter_is_not_used(start_vshd: StartVshd, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    vshd = start_vshd(f"--lasting_dir={folder}")
    done = vshd.run("--detach", "--", "true")
    assert done.returncode == 1
    assert b"other users can enter" in done.stderr


def test_person_attaches_to_a_terminal_and_leaves_it(vshd: Vshd) -> None:
    session = detach(vshd, "-t", "--", "sh", "-c", 'echo begun; read x; echo "<$x>"; stty size; read y; exit 4')
    with typing(vshd, f"--attach={session}", size=(33, 77)) as person:
        person.expect(b"begun")
        person.type(b"hello\r")
        person.expect(b"<hello>")
        person.expect(b"33 77")
        person.type(b"~.")
        person.expect(b"left session")
        assert person.wait() == 0
    vshd.run(f"--input={session}", input=b"\n")
    assert vshd.run(f"--wait={session}").returncode == 4
    assert b"<hello>" in vshd.run(f"--output={session}").stdout


def test_attached_client_starts_with_the_end_of_long_output(vshd: Vshd) -> None:
    session = detach(vshd, "-t", "--", "sh", "-c", "seq 1 20000; read x")
    wait_until(lambda: look(vshd, session)["output_end"] == 128_894, "all is printed")
    with typing(vshd, f"--attach={session}") as person:
        before = person.expect(b"\n20000\r\n")
        assert b"\n16000\r\n" in before
        assert b"\n10000\r\n" not in before
        person.type(b"\r")
        assert person.wait() == 0


def test_clients_leave_no_descriptor_in_the_keeper(vshd: Vshd) -> None:
    session = detach(vshd, "--", "sleep", "1000")
    pid = look(vshd, session)["pid"]
    if IS_VSOCK_GUEST:
        return
    keeper = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    count = len(os.listdir(f"/proc/{keeper}/fd"))
    for _ in range(5):
        vshd.run(f"--output={session}")
        vshd.run(f"--wait={session}", "--timeout=0.05")
    wait_until(lambda: len(os.listdir(f"/proc/{keeper}/fd")) == count, "no descriptor is left")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--follow"], "--follow belongs to --output"),
        (["--sessions", "--wait=x"], "--sessions and --wait do not go together"),
        (["--wait=x", "true"], "--wait takes no command"),
        (["--signal=x"], "--signal takes one signal"),
        (["--signal=x", "NOPE"], "'NOPE' is no signal"),
        (["--detach", "--output_size=1X", "true"], "--output_size must be a number of bytes"),
        (["--detach", "--noextended", "true"], "--detach needs the extended protocol"),
        (["--attach=x", "-L", "1:2"], "--attach takes no forward"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(vshd: Vshd, words: list[str], text: str) -> None:
    done = vshd.run(*words)
    assert done.returncode == 64
    assert text in done.stderr.decode()
