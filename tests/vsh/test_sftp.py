"""SFTP through a real vshd, with clients of others: OpenSSH's sftp through `vsh --subsystem`, and paramiko's."""

import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, IS_VSOCK_GUEST, Vshd, ended, wait_for_end, wait_until
from vsh.address import Address
from vsh.subsystem import open_subsystem

if TYPE_CHECKING:
    import paramiko

needs_sftp = pytest.mark.skipif(IS_VSOCK_GUEST, reason="the guest that runs tests has no OpenSSH client")
INIT = bytes.fromhex("00000005 01 00000003")
# More than any buffer on the way, and no whole number of packets.
BIG = 3_000_001


def run_sftp(vshd: Vshd, folder: Path, *commands: str) -> "subprocess.CompletedProcess[bytes]":
    """OpenSSH's sftp, which runs vsh as its server. -b - stops at the first command that fails."""
    server = shlex.join([sys.executable, "-m", "vsh", *vshd.where, "-s", "sftp"])
    return subprocess.run(
        ["sftp", "-q", "-D", server, "-b", "-"],
        input="".join(f"{command}\n" for command in commands).encode(),
        capture_output=True,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=DEADLINE_S,
        check=False,
    )


@needs_sftp
def test_openssh_client_puts_and_gets(vshd: Vshd, tmp_path: Path) -> None:
    data = os.urandom(BIG)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o750)
    os.utime(tmp_path / "a", (1_000_000_000, 1_000_000_000))
    guest = tmp_path / "guest"
    done = run_sftp(
        vshd,
        tmp_path,
        *("pwd", f"mkdir {guest}", f"put -p a {guest}/b", f"get -p {guest}/b c", f"put a {guest}/b", f"ls -la {guest}"),
        *(f"rename {guest}/b {guest}/d", f"ln -s d {guest}/link", f"ln {guest}/d {guest}/hard", f"df {guest}"),
        *(f"chmod 600 {guest}/d", f"rm {guest}/hard", f"mkdir {guest}/e", f"rmdir {guest}/e"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c").read_bytes() == data == (guest / "d").read_bytes()
    found = (tmp_path / "c").stat()
    assert (found.st_mode & 0o777, found.st_mtime) == (0o750, 1_000_000_000)
    assert sorted(entry.name for entry in guest.iterdir()) == ["d", "link"]
    assert (guest / "d").stat().st_mode & 0o777 == 0o600
    assert (guest / "link").readlink() == Path("d")
    assert b"%d" % BIG in done.stdout


@needs_sftp
def test_openssh_client_copies_trees(vshd: Vshd, tmp_path: Path) -> None:
    names = ["plain", "with blank", "ümlaut", "sub/deep/file"]
    for name in names:
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    done = run_sftp(vshd, tmp_path, f"put -R tree {tmp_path}/there", f"get -R {tmp_path}/there back")
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "back" / name).read_text() for name in names} == {name: name for name in names}


@needs_sftp
def test_openssh_client_reports_failures(vshd: Vshd, tmp_path: Path) -> None:
    done = run_sftp(vshd, tmp_path, f"get {tmp_path}/none x")
    assert done.returncode == 1
    assert b"not found" in done.stderr
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "a").write_bytes(b"x")
    done = run_sftp(vshd, tmp_path, f"put a {tmp_path}/full")
    assert done.returncode == 1


class _Channel:
    """What paramiko's SFTPClient needs of a channel."""

    def __init__(self, vshd: Vshd) -> None:
        self._socket = open_subsystem(Address.unix(str(vshd.path)), "sftp")
        self._socket.settimeout(DEADLINE_S)
        self.send = self._socket.send
        self.recv = self._socket.recv
        self.close = self._socket.close

    def get_name(self) -> str:
        return "sftp"


@pytest.fixture
def client(vshd: Vshd) -> "Iterator[paramiko.SFTPClient]":
    if IS_VSOCK_GUEST:
        pytest.skip("the address is that of a UNIX socket")
    paramiko = pytest.importorskip("paramiko")
    client = paramiko.SFTPClient(_Channel(vshd))
    yield client
    client.close()


def test_paramiko_reads_and_writes(client: "paramiko.SFTPClient", tmp_path: Path) -> None:
    data = os.urandom(BIG)
    (tmp_path / "a").write_bytes(data)
    name = str(tmp_path / "b")
    assert client.put(str(tmp_path / "a"), name).st_size == BIG
    client.get(name, str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == data
    with client.open(name, "r+") as file:
        file.seek(BIG - 10)
        assert file.read() == data[-10:]
        file.seek(5)
        file.write(b"changed")
        file.truncate(20)
        assert file.stat().st_size == 20
        assert [bytes(piece) for piece in file.readv([(0, 5), (12, 8)])] == [data[:5], data[12:20]]
    assert (tmp_path / "b").read_bytes() == data[:5] + b"changed" + data[12:20]
    with pytest.raises(OSError, match="File exists"):
        client.mkdir(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        client.open(str(tmp_path / "none"))


def test_paramiko_tends_folders_and_links(client: "paramiko.SFTPClient", tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    client.mkdir(str(folder), 0o700)
    for number in range(300):
        (folder / f"{number:0100d}").touch()
    client.symlink("target", str(folder / "link"))
    assert client.readlink(str(folder / "link")) == "target"
    found = {entry.filename: entry for entry in client.listdir_attr(str(folder))}
    assert len(found) == 301
    assert stat.S_ISLNK(found["link"].st_mode or 0)
    client.chdir(str(folder))
    assert client.normalize(".") == os.path.realpath(folder)
    client.rename("link", "renamed")
    client.posix_rename("renamed", f"{0:0100d}")
    client.utime(f"{1:0100d}", (1, 2))
    client.chmod(f"{1:0100d}", 0o601)
    assert (folder / f"{1:0100d}").stat().st_mode & 0o777 == 0o601
    for name in client.listdir("."):
        client.remove(name)
    client.chdir(None)
    client.rmdir(str(folder))
    assert not folder.exists()


# vsh --subsystem itself.


def test_end_of_input_ends_vsh(vshd: Vshd) -> None:
    done = vshd.run("--subsystem=sftp", input=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("words", [("--subsystem", "sftp"), ("--subsystem=sftp",), ("-s", "sftp"), ("-ssftp",)])
def test_spellings_of_the_flag(vshd: Vshd, words: tuple[str, ...]) -> None:
    done = vshd.run(*words, input=INIT)
    assert done.stdout[4:9] == bytes.fromhex("02 00000003"), done.stderr


def test_name_that_vshd_does_not_know_exits_as_a_command_would(vshd: Vshd) -> None:
    done = vshd.run("--subsystem=bogus")
    assert (done.returncode, done.stderr) == (127, b"vsh: no subsystem has the name 'bogus'\n")


@pytest.mark.parametrize(
    ("words", "brief"),
    [
        (("-s", "sftp", "ls"), b"--subsystem takes no command"),
        (("-s", "sftp", "-L", "1:2"), b"--subsystem takes no forward"),
        (("-s", "sftp", "-N"), b"--subsystem takes no forward"),
        (("-s", "sftp", "--proxy=1"), b"--subsystem takes no forward"),
    ],
)
def test_subsystem_stands_alone(vshd: Vshd, words: tuple[str, ...], brief: bytes) -> None:
    done = vshd.run(*words)
    assert done.returncode == 64
    assert brief in done.stderr


def test_service_ends_with_its_client(vshd: Vshd) -> None:
    with ended(vshd.start("-s", "sftp", stdin=subprocess.PIPE)) as process:
        process.stdin.write(INIT)
        process.stdin.flush()
        assert process.stdout.read(5)
        wait_until(lambda: len(vshd.children()) == 1, "a session serves")
        (pid,) = vshd.children()
        process.kill()
        wait_for_end(pid)


@pytest.mark.parametrize("kind", ["killed", "nonsense"])
def test_service_that_ends_first_is_a_lost_connection(vshd: Vshd, kind: str) -> None:
    """vsh does not wait for the end of its input then."""
    with ended(vshd.start("-s", "sftp", stdin=subprocess.PIPE)) as process:
        process.stdin.write(INIT)
        process.stdin.flush()
        assert process.stdout.read(5)
        if kind == "killed":
            (pid,) = vshd.children()
            os.kill(pid, signal.SIGKILL)
        else:
            process.stdin.write(bytes(64))
            process.stdin.flush()
        assert process.wait(DEADLINE_S) == 123
        assert process.stderr.read().startswith(b"vsh: the subsystem sftp of ")
