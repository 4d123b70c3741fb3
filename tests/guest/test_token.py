"""A machine that demands its token, in a real guest: who gets in, and where the token can be found."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import EVIDENCE, Run, save_evidence
from vmkit.machine import stop
from vsh.registry import find_machine
from vsh.token import make_token_text, read_token

NAME = "guarded"

# Reads every file below the named folders, and prints those that hold what comes on stdin; how many it read comes last.
SEARCH = """
import os, sys
secret = sys.stdin.buffer.read()
forms = (secret, bytes.fromhex(secret.decode()))
read = 0
for root in sys.argv[1:]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                data = os.read(fd, 1 << 20)
            except OSError:
                data = b""
            os.close(fd)
            read += 1
            if any(form in data for form in forms):
                print(path)
print(read)
"""


@pytest.fixture(scope="module")
def guarded(built: None, vmkit: Run) -> Iterator[str]:
    done = vmkit("up", "--accel", "tcg", "--backend", "user", "--token", "--name", NAME, "--cid", "41")
    assert done.returncode == 0, done.stderr.decode()
    yield NAME
    machine = find_machine(name=NAME)
    if machine is not None:
        stop.kill(machine)


class Secret:
    """A token that a failing test does not print."""

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret"


@pytest.fixture
def token(guarded: str) -> Secret:
    machine = find_machine(name=guarded)
    assert machine is not None
    return Secret(read_token(str(Path(machine.directory) / "token")))


def assert_hidden(token: Secret, texts: dict[str, bytes]) -> None:
    assert texts
    for name, text in texts.items():
        if token.value in text or token.value.hex().encode() in text:
            # Not an assertion about the text, which would be printed.
            pytest.fail(f"the token is in {name}", pytrace=False)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "token"}


def test_owner_notices_nothing(guarded: str, vsh: Run, vmkit: Run) -> None:
    assert vsh("--vm_name", guarded, "--", "echo", "hello").stdout == b"hello\n"
    assert vsh("--cid", "41", "--user", "user", "--", "id", "-un").stdout == b"user\n"
    assert vsh("--cid", "41", "--", "cat", stdin=b"x" * 300_000).stdout == b"x" * 300_000
    assert json.loads(vmkit("status", guarded, "--json").stdout)["token"] == "demanded"
    assert [b"token", b"demanded"] in [line.split() for line in vmkit("status", guarded).stdout.splitlines()]


def test_client_without_the_token_is_refused(guarded: str, vsh: Run) -> None:
    machine = find_machine(name=guarded)
    assert machine is not None
    assert machine.vsock is not None
    for flags in ([], ["--noextended"]):
        done = vsh(f"--uds={machine.vsock}", *flags, "--", "touch", "/tmp/stranger")
        assert done.returncode == 1
        assert b"demands its token" in done.stderr
    assert vsh("--vm_name", guarded, "--", "ls", "/tmp/stranger").returncode == 1


def test_machine_of_another_token_gets_no_request(guarded: str, vsh: Run, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_bytes(make_token_text())
    done = vsh("--vm_name", guarded, f"--token_file={other}", "--", "touch", "/tmp/false")
    assert done.returncode == 1
    assert b"did not prove that it is the machine that vmkit started" in done.stderr
    assert vsh("--vm_name", guarded, "--", "ls", "/tmp/false").returncode == 1


def test_token_file_that_somebody_opened_is_refused(guarded: str, vsh: Run) -> None:
    machine = find_machine(name=guarded)
    assert machine is not None
    path = Path(machine.directory) / "token"
    path.chmod(0o644)
    try:
        done = vsh("--vm_name", guarded, "--", "true")
        assert done.returncode == 1
        assert b": mode 0644" in done.stderr
    finally:
        path.chmod(0o600)


def test_forged_handshakes_get_nothing(guarded: str) -> None:
    """Frames by hand, as another program on this host would send them."""
    machine = find_machine(name=guarded)
    assert machine is not None
    assert machine.vsock is not None
    for frames in (b"\0\0\0\0", b"\xff" * 8, b"\2\0\0\0\x40\1" * 3):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(60)
            stranger.connect(machine.vsock)
            stranger.sendall(b"CONNECT 9001\n")
            assert stranger.recv(100).startswith(b"OK ")
            stranger.sendall(frames)
            answer = b""
            while data := stranger.recv(1 << 16):
                answer += data
        assert b"vsh ready" not in answer


# Where the token can be found.


def test_token_is_nowhere_on_the_host_but_in_its_file(guarded: str, token: Secret, vmkit: Run, folders: Path) -> None:
    machine = find_machine(name=guarded)
    assert machine is not None
    processes = {}
    for folder in Path("/proc").iterdir():
        for name in ("cmdline", "environ") if folder.name.isdigit() else ():
            try:
                processes[f"{folder}/{name}"] = (folder / name).read_bytes()
            except OSError:
                continue
    for pid in (machine.pid, machine.record["qemu_pid"]):
        assert f"/proc/{pid}/cmdline" in processes
    assert_hidden(token, processes)
    files = read_files(folders)
    for name in ("argv.txt", "qmp.log", "console.log", "machine.json", "events.jsonl", "monitor.log"):
        assert f"{machine.directory}/{name}" in files
    assert_hidden(token, files)
    for words in (("status",), ("status", "--json"), ("logs", "--kind", "argv"), ("logs", "--kind", "qmp")):
        assert_hidden(token, {" ".join(words): vmkit(words[0], guarded, *words[1:]).stdout})


def test_evidence_of_a_failed_test_holds_no_token(guarded: str, token: Secret) -> None:
    save_evidence(EVIDENCE / "token")
    try:
        kept = read_files(EVIDENCE / "token")
        assert any(path.endswith("qmp.log") for path in kept)
        assert_hidden(token, kept)
        assert not list((EVIDENCE / "token").rglob("token"))
    finally:
        for path in sorted((EVIDENCE / "token").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (EVIDENCE / "token").rmdir()


def test_guests_root_finds_the_token_in_the_firmware_alone(guarded: str, token: Secret, vsh: Run) -> None:
    search = ["python3", "-c", SEARCH, "/sys/firmware", "/etc", "/run", "/tmp", "/root", "/var"]
    done = vsh("--vm_name", guarded, "--", *search, stdin=token.value.hex().encode())
    *found, count = done.stdout.decode().split()
    assert "/sys/firmware/dmi/tables/DMI" in found, done.stderr.decode()
    assert all(path.startswith("/sys/firmware/dmi/") for path in found)
    assert int(count) > 10
    words = ["sh", "-c", "cat /proc/cmdline; dmesg; cat /proc/1/cmdline /proc/1/environ /proc/[0-9]*/cmdline"]
    seen = vsh("--vm_name", guarded, "--", *words)
    assert b"vmkit.token=smbios" in seen.stdout
    assert_hidden(token, {"the guest's": seen.stdout})


def test_guests_user_finds_the_token_nowhere(guarded: str, token: Secret, vsh: Run) -> None:
    places = ["/proc", "/sys", "/dev", "/etc", "/run", "/tmp", "/var"]
    done = vsh(
        "--vm_name", guarded, "--user", "user", "--", "python3", "-c", SEARCH, *places, stdin=token.value.hex().encode()
    )
    *found, count = done.stdout.decode().split()
    assert found == [], done.stderr.decode()
    assert int(count) > 1000


def test_guests_user_cannot_look_into_the_process_that_serves_it(guarded: str, vsh: Run) -> None:
    """It ran as root with the token a moment ago, and runs as the user now."""
    script = (
        "for name in mem environ maps auxv; do dd if=/proc/$PPID/$name bs=1 count=1; done; ls /proc/$PPID/fd; echo end"
    )
    done = vsh("--vm_name", guarded, "--user", "user", "--", "sh", "-c", script)
    assert done.stdout == b"end\n"
    assert done.stderr.count(b"Permission denied") == 5, done.stderr.decode()


def test_guest_that_does_not_find_its_token_does_not_come_up(up: Run) -> None:
    done = up("--name", "tokenless", "--append", "vmkit.token=smbios")
    assert done.returncode == 1
    assert b"the firmware holds no token" in done.stderr
    assert find_machine(name="tokenless") is None


def test_token_is_gone_with_its_machine(up: Run, vmkit: Run, folders: Path) -> None:
    assert up("--token", "--name", "short").returncode == 0
    machine = find_machine(name="short")
    assert machine is not None
    path = Path(machine.directory) / "token"
    assert path.exists()
    assert vmkit("down", "short").returncode == 0
    assert not path.exists()
    assert [name for _, _, names in os.walk(folders / "state") for name in names if name == "token"] == []
