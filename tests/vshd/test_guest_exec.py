"""vshd --exec-from over UNIX sockets: commands that a host sends, in both modes of vsock_guest_exec."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, START, is_alive, wait_until
from vshd.flags import FlagError, parse_flags
from vshd.wire.commands import COMMAND_BYTES_MAX, BadCommandError, CommandReader, encode_command, parse_host

PEER = Path(__file__).parents[1] / "fakes/guest_exec_host.py"
Vshd = subprocess.Popen[bytes]


@contextlib.contextmanager
def guest(where: str, *words: str) -> Iterator[Vshd]:
    """A vshd that takes commands from a host."""
    argv = [sys.executable, "-I", "-S", "-B", "-c", START.format(str(CHECKOUT))]
    with subprocess.Popen(
        [*argv, "--exec-from", where, *words, "--log_stderr"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Host:
    """A host that the test speaks for."""

    def __init__(self, path: Path) -> None:
        self.where = f"unix:{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(DEADLINE_S)
        return connection

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with contextlib.closing(Host(tmp_path / "host")) as host:
        yield host


def end(vshd: Vshd) -> tuple[int, str, str]:
    out, err = vshd.communicate(timeout=DEADLINE_S)
    return vshd.returncode, out.decode(), err.decode(errors="replace")


@pytest.mark.parametrize(
    ("mode", "commands", "status", "printed"),
    [
        ("disposable", ["echo one; exit 3"], 3, "one\n"),
        ("persistent", ["echo one; exit 3", "echo $((1 + 1))", "true"], 0, "one\n2\n"),
    ],
)
def test_host_of_the_source_is_served(
    tmp_path: Path, mode: str, commands: list[str], status: int, printed: str
) -> None:
    argv = [sys.executable, "-I", str(PEER), str(tmp_path / "peer"), mode, *commands]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"listening\n"
        words = ["persistent"] if mode == "persistent" else []
        with guest(f"unix:{tmp_path}/peer", *words) as vshd:
            assert end(vshd)[:2] == (status, printed)
        assert peer.wait(DEADLINE_S) == 0


def test_disposable_guest_leaves_at_once(host: Host) -> None:
    with guest(host.where) as vshd, host.accept() as connection:
        connection.sendall(b"echo ran")
        # The host neither closes nor sends more.
        assert connection.recv(1) == b""
        assert end(vshd)[:2] == (0, "ran\n")


def test_commands_run_one_after_another(host: Host) -> None:
    with guest(host.where, "persistent") as vshd, host.accept() as connection:
        both = [encode_command(command, is_persistent=True) for command in (b"echo 1; sleep 0.1; echo 2", b"echo 3")]
        for byte in b"".join(both):
            connection.send(bytes([byte]))
        connection.shutdown(socket.SHUT_WR)
        assert end(vshd)[:2] == (0, "1\n2\n3\n")


def test_longest_command_runs_whole(host: Host) -> None:
    command = b"printf %d ${#1} #".ljust(COMMAND_BYTES_MAX, b"x")
    with guest(host.where) as vshd, host.accept() as connection:
        connection.sendall(command)
        assert end(vshd)[:2] == (0, "0")


@pytest.mark.parametrize(
    ("words", "sent", "complaint"),
    [
        ([], b"", "the host left and sent no command"),
        ([], b"x" * (COMMAND_BYTES_MAX + 1), "a command is at most 2048 bytes long"),
        ([], b"echo a\0b", "a command must not have a NUL byte"),
        (["persistent"], b"\x01\x08", "a command is at most 2048 bytes long, not 2049"),
        (["persistent"], b"\0\0", "the command is empty"),
        (["persistent"], b"\x05", "the host left within a command"),
        (["persistent"], b"\x05\0echo", "the host left within a command"),
    ],
)
def test_what_is_no_command_is_not_run(host: Host, words: list[str], sent: bytes, complaint: str) -> None:
    with guest(host.where, *words) as vshd, host.accept() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        status, out, err = end(vshd)
        assert (status, out) == (1, "")
        assert complaint in err


def test_host_that_sends_nothing_is_given_up(host: Host) -> None:
    with guest(host.where, "--handshake_timeout=1") as vshd, host.accept():
        status, _, err = end(vshd)
        assert status == 1
        assert "the host sent no whole command within 1 s" in err


def test_host_that_is_not_there_is_named(tmp_path: Path) -> None:
    with guest(f"unix:{tmp_path}/none") as vshd:
        status, _, err = end(vshd)
        assert status == 1
        assert f"cannot connect to unix:{tmp_path}/none: No such file or directory" in err


def test_signal_ends_the_command_and_what_it_started(host: Host, tmp_path: Path) -> None:
    with guest(host.where, "persistent") as vshd, host.accept() as connection:
        script = f"sleep 99 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; wait".encode()
        connection.sendall(encode_command(script, is_persistent=True))
        wait_until((tmp_path / "pid").exists, "the command runs")
        vshd.send_signal(signal.SIGTERM)
        status, _, err = end(vshd)
        assert status == 128 + signal.SIGTERM
        assert "ended by a signal" in err
        assert not is_alive(int((tmp_path / "pid").read_text()))


def test_log_has_each_command_and_its_end(host: Host) -> None:
    with guest(host.where, "persistent") as vshd, host.accept() as connection:
        for command in (b"exit 4", b"kill -9 $$", b"printf '\\033' #\x1b\n"):
            connection.sendall(encode_command(command, is_persistent=True))
        connection.shutdown(socket.SHUT_WR)
        err = end(vshd)[2]
        assert "exit 4: exit 4 after" in err
        assert "kill -9 $$: signal 9 after" in err
        assert "\x1b" not in err


@pytest.mark.parametrize(
    ("text", "place"),
    [
        # The examples of the source. A guest's host is CID 2 whatever they write for it.
        ("1:2049", (2, 2049)),
        ("-1:", (2, 1024)),
        (":1025", (2, 1025)),
        ("foo:bar", (2, 1024)),
        ("", (2, 1024)),
        (":", (2, 1024)),
        ("7", (7, 1024)),
        ("7:9", (7, 9)),
        ("4294967295:4294967295", (2, 1024)),
        ("99999999999999999999:1:2", (2, 1024)),
        ("\N{SUPERSCRIPT THREE}:\N{ARABIC-INDIC DIGIT SEVEN}", (2, 1024)),
    ],
)
def test_address_takes_the_defaults_for_what_is_no_number(text: str, place: tuple[int, int]) -> None:
    assert parse_host(text) == place


def test_words_of_the_source_are_flags() -> None:
    options = parse_flags(["--exec-from", "-1:", "persistent"])
    assert (options.exec_from, options.persistent) == ("-1:", True)
    assert parse_flags(["--exec_from="]).exec_from == ":"
    with pytest.raises(FlagError, match="--persistent needs --exec_from"):
        parse_flags(["--persistent"])
    with pytest.raises(FlagError, match="Unknown extra"):
        parse_flags(["persistent"])


def test_af_vsock_is_not_opened_where_it_is_denied() -> None:
    with guest("2:1024") as vshd:
        status, _, err = end(vshd)
        assert status == 1
        assert "VSH_AF_VSOCK" in err


def test_reader_keeps_no_more_than_a_command() -> None:
    reader = CommandReader()
    with pytest.raises(BadCommandError, match="not 65535"):
        reader.receive_data(b"\xff\xff" + bytes(1 << 16))
