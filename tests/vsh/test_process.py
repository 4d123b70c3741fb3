"""Client.popen: a command of a guest with file-like streams, against a real vshd."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vsh.live import DEADLINE_S, StartVshd, Vshd, wait_until
from vsh.address import Address
from vsh.client import Client
from vsh.errors import CommandFailed, ConnectionLost, ExecError, UsageError, VshError
from vsh.process import DEVNULL, PIPE, STDOUT
from vsh.pump import TimedOut


@pytest.fixture(params=[True, False], ids=["extended", "legacy"])
def client(vshd: Vshd, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(Address.unix(str(vshd.path)), extended=request.param) as client:
        yield client


@pytest.fixture
def modern(vshd: Vshd) -> Client:
    return Client(Address.unix(str(vshd.path)))


def test_process_streams_line_by_line(client: Client) -> None:
    with client.popen(["sh", "-c", "while read line; do echo got $line; done; exit 3"], text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for word in ("one", "two"):
            process.stdin.write(word + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"got {word}\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 3
    assert (process.returncode, process.exit, process.signal) == (3, 3, 0)


def test_process_separates_stdout_and_stderr(client: Client) -> None:
    process = client.popen(["sh", "-c", "echo out; echo err >&2"])
    assert process.communicate(timeout=DEADLINE_S) == (b"out\n", b"err\n")
    assert process.returncode == 0


def test_process_merges_stderr_into_stdout(modern: Client) -> None:
    process = modern.popen(["sh", "-c", "echo out; echo err >&2"], stderr=STDOUT, text=True)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert out
    assert (sorted(out.split()), err) == (["err", "out"], None)


def test_communicate_carries_more_than_every_buffer(modern: Client) -> None:
    data = os.urandom(3 << 20)
    assert modern.popen(["cat"]).communicate(data, timeout=DEADLINE_S) == (data, b"")


def test_communicate_survives_a_target_that_closes_stdin(modern: Client) -> None:
    process = modern.popen(["sh", "-c", "exec 0<&-; echo ok"])
    assert process.communicate(b"x" * (3 << 20), timeout=DEADLINE_S)[0] == b"ok\n"


def test_text_keeps_characters_whole_at_every_chunk(modern: Client) -> None:
    """The target writes single bytes: each character arrives in pieces."""
    script = "printf '\\342'; sleep 0.05; printf '\\202'; sleep 0.05; printf '\\254 \\377\\n'"
    with modern.popen(["sh", "-c", script], text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "\u20ac \ufffd\n"


def test_run_decodes_text_and_takes_text(modern: Client) -> None:
    result = modern.run(["cat"], input="gr\u00fc\u00df\n", text=True)
    assert result.stdout == "gr\u00fc\u00df\n"


def test_run_check_raises_with_the_result(client: Client) -> None:
    with pytest.raises(CommandFailed, match=r"exited with status 7: sh -c 'echo no >&2; exit 7'") as caught:
        client.run(["sh", "-c", "echo no >&2; exit 7"], check=True)
    assert caught.value.status == 7
    assert caught.value.details == "no"
    assert caught.value.result.stderr == b"no\n"


def test_run_check_names_the_signal(modern: Client) -> None:
    with pytest.raises(CommandFailed, match="was killed by signal 9"):
        modern.run(["sh", "-c", "kill -9 $$"], check=True)


@pytest.mark.parametrize("call", ["run", "popen"])
@pytest.mark.parametrize("argv", ["echo hi", b"echo hi"])
def test_string_instead_of_words_is_refused(modern: Client, call: str, argv: str) -> None:
    with pytest.raises(UsageError, match="needs a list of words, not the string 'echo hi'") as caught:
        getattr(modern, call)(argv)
    assert f"{call}(['echo', 'hi'])" in caught.value.hint


def test_words_of_another_type_are_refused(modern: Client) -> None:
    with pytest.raises(UsageError, match="not 7"):
        modern.run(["sleep", 7])  # type: ignore[list-item]  # the wrong type is the point


def test_signals_reach_the_process(client: Client) -> None:
    with client.popen(["sh", "-c", "trap 'echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.01; done"]) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == b"ready\n"
        p.terminate()
        assert p.stdout.read() == b"stopped\n"
        assert p.wait(DEADLINE_S) == 5


def test_kill_ends_the_process(modern: Client) -> None:
    process = modern.popen(["sleep", "97"])
    process.kill()
    assert process.wait(DEADLINE_S) == -9
    assert (process.exit, process.signal) == (137, 9)
    process.kill()


def test_kill_of_a_legacy_session_ends_the_target(vshd: Vshd) -> None:
    process = Client(Address.unix(str(vshd.path)), extended=False).popen(["sleep", "97"])
    process.kill()
    with pytest.raises(VshError, match=r"kill\(\) closed the command's session"):
        process.wait(DEADLINE_S)
    wait_until(lambda: not vshd.children(), "the target has ended")


def test_signal_that_legacy_mode_lacks_is_refused(vshd: Vshd) -> None:
    with Client(Address.unix(str(vshd.path)), extended=False).popen(["cat"]) as process:
        with pytest.raises(UsageError, match="cannot send signal 10"):
            process.send_signal(signal.SIGUSR1)
        assert process.stdin is not None
        process.stdin.close()


def test_wait_with_a_timeout_leaves_the_process_running(modern: Client) -> None:
    with modern.popen(["cat"]) as process:
        with pytest.raises(TimedOut):
            process.wait(0.05)
        with pytest.raises(TimedOut):
            process.communicate(timeout=0.0) if process.stdin is None else process.wait(0.0)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.write(b"still here")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"still here"


def test_exit_is_known_before_the_output_is_read(modern: Client) -> None:
    """The pipe to the caller is full, and wait() still returns."""
    with modern.popen(["head", "-c", "200000", "/dev/zero"]) as process:
        assert process.wait(DEADLINE_S) == 0
        assert process.stdout is not None
        assert len(process.stdout.read()) == 200_000


def test_terminal_can_be_resized(modern: Client) -> None:
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.01; done"
    with modern.popen(["sh", "-c", script], size=(24, 80), stderr=DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"24 80\r\n"
        process.resize(33, 111)
        assert process.stdout.readline() == b"33 111\r\n"


def test_streams_can_be_files_and_descriptors(modern: Client, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"data")
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        process = modern.popen(["cat"], stdin=source, stdout=sink.fileno(), stderr=DEVNULL)
        assert process.wait(DEADLINE_S) == 0
        assert process.communicate() == (None, None)
    assert (tmp_path / "out").read_bytes() == b"data"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_stream_of_no_kind_is_refused_and_leaves_nothing(modern: Client, name: str) -> None:
    with nothing_left_open(), pytest.raises(UsageError, match=f"{name} must be PIPE"):
        modern.popen(["cat"], **{name: b"data"})  # type: ignore[call-overload]  # the wrong type is the point


def test_command_that_cannot_be_executed_leaves_nothing(modern: Client) -> None:
    with nothing_left_open(), pytest.raises(ExecError):
        modern.popen(["no-such-command"])


def test_process_leaves_no_descriptor(modern: Client) -> None:
    with nothing_left_open():
        for _ in range(3):
            with modern.popen(["echo", "x"], stdin=PIPE) as process:
                assert process.stdout is not None
                assert process.stdout.read() == b"x\n"


def test_block_left_by_an_exception_kills_the_command(modern: Client, vshd: Vshd) -> None:
    with pytest.raises(KeyError), modern.popen(["sleep", "97"]):
        raise KeyError
    wait_until(lambda: not vshd.children(), "the target has ended")


def test_lost_connection_is_raised_where_the_caller_waits(start_vshd: StartVshd) -> None:
    server = start_vshd()
    process = Client(Address.unix(str(server.path))).popen(["sleep", "97"])
    for pid in server.children():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ConnectionLost):
        process.wait(DEADLINE_S)
    with pytest.raises(ConnectionLost):
        process.poll()
    assert process.stdout is not None
    assert process.stdout.read() == b""
