"""A machine that demands its token, with real processes: who gets in, who does not, and what the token is seen in."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.vsh.live import DEADLINE_S, StartVshd, Vshd, ended, read_line, wait_until
from vsh import cli, registry
from vsh.address import Address, address_of
from vsh.client import Client
from vsh.errors import VshError
from vsh.flags import parse_flags
from vsh.registry import Entry
from vsh.token import read_token
from vshd.server import UNPROVEN_MAX
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.frames import encode_frame
from vshd.wire.messages import Failure, HostMessage, SetupConnectionResponse
from vshd.wire.proof import SERVER, Proof, render_token
from vshd.wire.server import ServerConnection

TOKEN = bytes(range(32))
OTHER = bytes(32)


class StartGuarded(Protocol):
    """The fixture start_guarded."""

    def __call__(self, *flags: str) -> Vshd: ...


def write_token(path: Path, token: bytes = TOKEN, mode: int = 0o600) -> Path:
    path.write_bytes(render_token(token))
    path.chmod(mode)
    return path


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_token(tmp_path / "token")


@pytest.fixture
def start_guarded(start_vshd: StartVshd, token_file: Path) -> StartGuarded:
    """Starts a vshd that demands the token."""
    return lambda *flags: start_vshd(f"--token_from=file:{token_file}", *flags)


# Who gets in.


@pytest.mark.parametrize("flags", [[], ["--spare_time=5"]], ids=["fork", "spare"])
def test_owner_of_the_token_gets_a_session(start_guarded: StartGuarded, token_file: Path, flags: Sequence[str]) -> None:
    vshd = start_guarded(*flags)
    for number in range(3):
        done = vshd.run(f"--token_file={token_file}", "--", "sh", "-c", f"cat; echo {number}", input=b"in ")
        assert done.stdout == b"in %d\n" % number, done.stderr
        assert done.returncode == 0


def test_request_of_any_size_is_proven(start_guarded: StartGuarded, token_file: Path) -> None:
    done = start_guarded().run(f"--token_file={token_file}", "--", "printf", "%s", *["x" * 50_000] * 4)
    assert done.stdout == b"x" * 200_000


def test_program_gets_a_session(start_guarded: StartGuarded, token_file: Path) -> None:
    address = Address.unix(str(start_guarded().path))
    address.token_file = str(token_file)
    assert Client(address).run(["sh", "-c", "exit 5"]).exit == 5


def test_failures_of_the_command_are_told_as_without_a_token(start_guarded: StartGuarded, token_file: Path) -> None:
    done = start_guarded().run(f"--token_file={token_file}", "--", "/nonexistent")
    assert done.returncode == 127


# Who does not.


@pytest.mark.parametrize("flags", [[], ["--noextended"]], ids=["extended", "legacy"])
def test_client_without_the_token_runs_nothing(
    start_guarded: StartGuarded, tmp_path: Path, flags: Sequence[str]
) -> None:
    vshd = start_guarded()
    done = vshd.run(*flags, "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1
    assert b"demands its token" in done.stderr
    assert not (tmp_path / "ran").exists()
    wait_until(lambda: "refused: this machine demands its token" in vshd.log, "the log says so")


def test_other_token_runs_nothing_and_is_told_before_anything_is_sent(
    start_guarded: StartGuarded, tmp_path: Path
) -> None:
    vshd = start_guarded()
    other = write_token(tmp_path / "other", OTHER)
    done = vshd.run(f"--token_file={other}", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1
    assert b"did not prove that it is the machine that vmkit started" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flags", [(), ("--noextended",)], ids=["extended", "legacy"])
def test_server_without_the_token_is_noticed(
    start_vshd: StartVshd, token_file: Path, tmp_path: Path, flags: Sequence[str]
) -> None:
    vshd = start_vshd(*flags)
    done = vshd.run(f"--token_file={token_file}", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1
    assert b"did not prove" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert str(tmp_path) not in vshd.log


def test_legacy_mode_with_a_token_is_refused_before_connecting(token_file: Path, start_guarded: StartGuarded) -> None:
    done = start_guarded().run(f"--token_file={token_file}", "--noextended", "--", "true")
    assert b"ChromeOS's protocol cannot prove" in done.stderr
    assert done.returncode == 1


def test_legacy_client_is_served_where_the_image_allows_it(start_guarded: StartGuarded, token_file: Path) -> None:
    vshd = start_guarded("--allow_legacy_clients")
    assert vshd.run("--noextended", "--", "echo", "legacy").stdout == b"legacy\n"
    assert vshd.run(f"--token_file={token_file}", "--", "echo", "proven").stdout == b"proven\n"
    assert b"demands its token" in vshd.run("--", "true").stderr


@pytest.mark.parametrize("flags", [["--token_from=file:/nonexistent"], ["--token_from=nonsense"], ["--noextended"]])
def test_vshd_does_not_start_without_the_token_it_shall_demand(
    tmp_path: Path, token_file: Path, flags: Sequence[str]
) -> None:
    where = [f"--listen=unix:{tmp_path / 's'}", "--log_stderr", f"--token_from=file:{token_file}"]
    argv = [sys.executable, "-m", "vshd", *where, *flags]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith(b"vshd: ")
    assert not (tmp_path / "s").exists()


def test_strangers_who_hold_every_place_keep_nobody_out(start_guarded: StartGuarded, token_file: Path) -> None:
    """Any user of the host can connect and say nothing."""
    vshd = start_guarded("--max_sessions=4")
    owner = f"--token_file={token_file}"
    with ended(vshd.start(owner, "--", "sh", "-c", "echo up; cat", stdin=subprocess.PIPE)) as session:
        assert read_line(session.stdout) == "up"
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(vshd.connect()) for _ in range(12)]
            for number in range(3):
                assert vshd.run(owner, "--", "echo", str(number)).stdout == b"%d\n" % number
            assert strangers[0].recv(1) == b""
            session.stdin.write(b"still here\n")
            session.stdin.flush()
            assert read_line(session.stdout) == "still here"
            session.stdin.close()
            assert session.wait(DEADLINE_S) == 0
    assert "dropped: it has proven nothing, and others wait" in vshd.log
    assert "ended with -9" not in vshd.log


def test_strangers_are_few_at_a_time(start_guarded: StartGuarded, token_file: Path) -> None:
    """Each costs a process, and a small guest's memory must not be theirs to fill."""
    vshd = start_guarded("--max_sessions=1000")
    with contextlib.ExitStack() as stack:
        for _ in range(UNPROVEN_MAX + 50):
            stack.enter_context(vshd.connect())
        assert vshd.run(f"--token_file={token_file}", "--", "echo", "in").stdout == b"in\n"
        # A dropped stranger's process ends soon after, and on a busy machine later than the next client is served.
        wait_until(lambda: len(vshd.children()) <= UNPROVEN_MAX + 2, "few strangers have a process")


def test_places_taken_by_those_who_proved_themselves_are_theirs(start_guarded: StartGuarded, token_file: Path) -> None:
    vshd = start_guarded("--max_sessions=1")
    owner = f"--token_file={token_file}"
    with ended(vshd.start(owner, "--", "sh", "-c", "echo up; cat", stdin=subprocess.PIPE)) as session:
        assert read_line(session.stdout) == "up"
        assert b"too many sessions" in vshd.run(owner, "--", "true").stderr
        session.stdin.close()
        assert session.wait(DEADLINE_S) == 0


def test_forward_is_proven_like_a_session(start_guarded: StartGuarded, token_file: Path, tmp_path: Path) -> None:
    vshd = start_guarded()
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(tmp_path / "service"))
        service.listen()
        service.settimeout(0.2)
        place = f"--proxy=unix:{tmp_path / 'service'}"
        done = vshd.run(place)
        assert b"demands its token" in done.stderr
        with pytest.raises(TimeoutError):
            service.accept()
        service.settimeout(DEADLINE_S)
        with ended(vshd.start(f"--token_file={token_file}", place, stdin=subprocess.PIPE)) as proxy:
            with service.accept()[0] as connection:
                connection.sendall(b"through\n")
                assert read_line(proxy.stdout) == "through"
            proxy.stdin.close()
            assert proxy.wait(DEADLINE_S) == 0


def serve_once(path: Path, answer: Callable[[bytes], bytes]) -> tuple[threading.Thread, list[bytes]]:
    """A server of one connection that says `answer(first bytes)`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    heard = []

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            stub = connection.recv(1 << 16)
            connection.sendall(answer(stub))
            heard.append(stub)
            while data := connection.recv(1 << 16):
                heard.append(data)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, heard


def answer_without_proof(_stub: bytes) -> bytes:
    limits = default_limits()
    limits.nonce = bytes(32)
    return encode_frame(SetupConnectionResponse(messages.READY, b"vsh ready", extended=limits).encode(), 4096)


def answer_with_a_guess(stub: bytes) -> bytes:
    return answer_without_proof(stub) + encode_frame(HostMessage(messages.PROOF, bytes(32)).encode(), 4096)


def answer_as_legacy(_stub: bytes) -> bytes:
    return encode_frame(SetupConnectionResponse(messages.READY, b"vsh ready", 7).encode(), 4096)


def refuse_the_proof(stub: bytes) -> bytes:
    """A server that proves itself and then takes no proof of ours."""
    server = ServerConnection(default_limits(), Proof(SERVER, TOKEN, bytes(32)))
    server.receive_data(stub)
    answer = server.output.take()
    refused = SetupConnectionResponse(messages.FAILED, b"no")
    refused.extended = default_limits()
    refused.extended.failure = Failure(messages.NOT_TRUSTED)
    return answer + encode_frame(HostMessage(messages.STARTED, refused).encode(), 4096)


def fail_before_the_request(stub: bytes) -> bytes:
    server = ServerConnection(default_limits(), Proof(SERVER, TOKEN, bytes(32)))
    server.receive_data(stub)
    server.send_failure("vshd is shutting down", Failure(messages.SHUTDOWN))
    return server.output.take()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answer_without_proof, "does not answer"),
        (answer_with_a_guess, "did not prove that it is the machine that vmkit started: its proof is wrong"),
        (answer_as_legacy, "did not prove that it is the machine that vmkit started"),
        (refuse_the_proof, "refused its token: it may not be the machine that vmkit started"),
        (fail_before_the_request, "vshd is shutting down"),
    ],
)
def test_every_false_server_is_named_and_hears_nothing(
    tmp_path: Path, token_file: Path, answer: Callable[[bytes], bytes], words: str
) -> None:
    thread, heard = serve_once(tmp_path / "s", answer)
    address = Address.unix(str(tmp_path / "s"))
    address.token_file = str(token_file)
    with pytest.raises(VshError) as caught:
        Client(address, timeout_s=1.0 if answer is answer_without_proof else 20.0).run(["secret-command"])
    thread.join(10)
    assert words in caught.value.brief
    if answer not in (refuse_the_proof, fail_before_the_request):
        assert b"secret-command" not in b"".join(heard)
    assert TOKEN not in b"".join(heard)


# What the token is seen in.


def test_token_is_in_nothing_that_a_session_or_ps_can_see(start_guarded: StartGuarded, token_file: Path) -> None:
    vshd = start_guarded()
    show = (
        "cat /proc/self/environ /proc/self/cmdline /proc/$PPID/environ /proc/$PPID/cmdline "
        f"/proc/{vshd.pid}/environ /proc/{vshd.pid}/cmdline; ls -l /proc/$PPID/fd /proc/self/fd; env; ps axww"
    )
    done = vshd.run("--debug", f"--token_file={token_file}", "--", "sh", "-c", show)
    assert done.returncode == 0
    for text in (done.stdout, done.stderr, vshd.log.encode()):
        assert text
        assert TOKEN not in text
        assert TOKEN.hex().encode() not in text
        assert b"0001020304" not in text
    assert str(token_file).encode() not in done.stdout.partition(b"/proc/self/fd")[2].partition(b"PID")[0]


# The file.


def test_token_file_with_and_without_a_newline_is_read(token_file: Path) -> None:
    assert read_token(str(token_file)) == TOKEN
    with token_file.open("ab") as file:
        file.write(b"\n")
    assert read_token(str(token_file)) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602, 0o666, 0o610])
def test_token_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_token(tmp_path / "token", mode=mode)
    with pytest.raises(VshError, match=f"other users have access to the token file .*: mode 0{mode:o}") as caught:
        read_token(str(path))
    assert "chmod 600" in caught.value.hint


@pytest.mark.root
def test_token_file_of_somebody_else_is_refused(token_file: Path) -> None:
    os.chown(token_file, 12345, -1)
    with pytest.raises(VshError, match="belongs to uid 12345"):
        read_token(str(token_file))


def test_token_file_that_is_a_link_or_no_file_is_refused(tmp_path: Path, token_file: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(token_file)
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name, words in (
        ("link", "is a symbolic link"),
        ("fifo", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("none", "cannot read the token file"),
        ("a\0b", "cannot read the token file"),
    ):
        with pytest.raises(VshError, match=words):
            read_token(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "text",
    [b"", b"vmkit.token:", TOKEN.hex().encode(), render_token(TOKEN)[:-1], render_token(TOKEN) + b"0", bytes(1 << 20)],
)
def test_file_without_a_token_is_refused_and_not_quoted(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(VshError, match="holds no token") as caught:
        read_token(str(path))
    assert TOKEN.hex()[:20] not in caught.value.render("vsh")


# Where it is looked for.


def make_machine(**record: object) -> Entry:
    return Entry("/run/x/machines/a", {"name": "a", "cid": 3, "state": "ready", **record})


def test_registry_says_which_machine_demands_a_token() -> None:
    assert make_machine().token_file == ""
    assert make_machine(token=None).token_file == ""
    assert make_machine(token="demanded").token_file == "/run/x/machines/a/token"
    assert make_machine(token={"unknown": 1}).token_file, "what a later vmkit says is no leave to go without"


@pytest.mark.parametrize("vsock", [None, "/run/x/machines/a/vsock.sock"])
def test_address_of_a_machine_has_its_token(vsock: str | None) -> None:
    assert address_of(make_machine(token="demanded", vsock=vsock)).token_file == "/run/x/machines/a/token"
    assert address_of(make_machine(vsock=vsock)).token_file == ""


def test_flag_wins_over_the_registry(
    monkeypatch: pytest.MonkeyPatch, start_guarded: StartGuarded, token_file: Path
) -> None:
    machine = make_machine(token="demanded", vsock=None)
    monkeypatch.setattr(registry, "read_machines", lambda: [machine])
    monkeypatch.setenv("VSH_AF_VSOCK", "deny")
    with pytest.raises(VshError, match="token file /run/x/machines/a/token"):
        cli.run(parse_flags(["--cid=3", "--", "true"]))
    with pytest.raises(VshError, match="AF_VSOCK is denied"):
        cli.run(parse_flags(["--cid=3", f"--token_file={token_file}", "--", "true"]))
