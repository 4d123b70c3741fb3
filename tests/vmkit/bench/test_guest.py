"""A transfer of the Python API's, with a vshd on this host in the guest's place."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import Vshd
from vmkit.bench.guest import SshGuest, VshGuest, time_command
from vmkit.bench.sinks import SOURCE_BLOCK_BYTES
from vmkit.errors import HostError
from vsh.address import Address
from vsh.errors import ConnectionLost, Unanswered, VshError
from vsh.executor import Executor


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[VshGuest]:
    server = Vshd(tmp_path)
    yield VshGuest(Address.unix(str(server.path)))
    server.stop()


@pytest.mark.parametrize("way", ["out", "in"])
def test_bulk_takes_its_time(guest: VshGuest, way: str) -> None:
    assert 0 < guest.time_bulk(way, 8 * SOURCE_BLOCK_BYTES) < 30


@pytest.mark.parametrize(
    ("script", "told"), [("echo short", "status 0, 6 bytes of 8"), ("echo enough.; exit 3", "status 3, 8 bytes of 8")]
)
def test_bulk_that_does_not_come_has_no_time(guest: VshGuest, script: str, told: str) -> None:
    with pytest.raises(HostError, match=f"'sh' in the guest: {told}"):
        guest.time_session(["sh", "-c", script], b"", 8)


# In the place of ssh: it runs its last word by a shell, as sshd does, and fails like ssh for a host named gone.
SSH = """\
#!/bin/sh
test "$2" != gone || { echo 'Connection refused' >&2; exit 255; }
exec sh -c "$3"
"""


@pytest.fixture(params=["vsh", "ssh"])
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Executor:
    if request.param == "vsh":
        guest: VshGuest = request.getfixturevalue("guest")
        return guest
    return SshGuest([str(make_ssh(tmp_path)), "-q", "box"])


def make_ssh(folder: Path) -> Path:
    program = folder / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    return program


def test_every_executor_runs_a_command(executor: Executor) -> None:
    result = executor.run(["sh", "-c", "echo out; echo err >&2; exit 3", "a word", "it's"])
    assert (result.stdout, result.stderr, result.exit) == (b"out\n", b"err\n", 3)
    assert executor.run(["printf", "%s|", "two words", "*", "it's"]).stdout == b"two words|*|it's|"
    assert time_command(executor, ["true"]) > 0
    with pytest.raises(HostError, match="'false' failed in the guest with status 1"):
        time_command(executor, ["false"])
    executor.close()


def test_every_executor_moves_files_in_and_out(executor: Executor, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a file").write_bytes(bytes(range(256)) * 1000)
    (source / "link").symlink_to("a file")
    inside, back = tmp_path / "inside", tmp_path / "back"
    assert not executor.exists(str(inside))
    executor.push(str(source), str(inside))
    assert executor.exists(str(inside)) and executor.exists(str(inside / "link"))
    executor.pull(str(inside), str(back))
    assert (back / "a file").read_bytes() == (source / "a file").read_bytes()
    assert (back / "link").readlink() == Path("a file")


def test_ssh_that_cannot_connect_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="ssh failed") as caught:
        SshGuest([str(make_ssh(tmp_path)), "-q", "gone"]).run(["true"])
    assert "Connection refused" in caught.value.details


@pytest.mark.parametrize("script", ["exec sleep 60", "exec >&- 2>&-; exec sleep 60", "while :; do echo more; done"])
def test_ssh_command_that_does_not_end_is_ended(script: str, tmp_path: Path) -> None:
    guest = SshGuest([str(make_ssh(tmp_path)), "-q", "box"], timeout_s=0.3)
    with pytest.raises(Unanswered, match=r"ssh did not end within 0.3 s"):
        guest.run(["sh", "-c", script])


@pytest.mark.parametrize("stream", ["1", "2"])
def test_ssh_output_has_a_ceiling(stream: str, tmp_path: Path) -> None:
    guest = SshGuest([str(make_ssh(tmp_path)), "-q", "box"], output_limit_bytes=1000)
    assert len(guest.run(["sh", "-c", f"head -c 1000 /dev/zero >&{stream}"]).stdout) == (1000 if stream == "1" else 0)
    with pytest.raises(VshError, match="the command wrote more than 1000 bytes"):
        guest.run(["sh", "-c", f"exec yes >&{stream}"])


# In the place of ssh: a guest that takes nothing and sends nothing.
MUTE_SSH = "#!/bin/sh\nexec sleep 60\n"


def test_ssh_copy_that_does_not_end_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    program = make_ssh(tmp_path)
    program.write_text(MUTE_SSH)
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    guest = SshGuest([str(program), "-q", "box"], copy_timeout_s=0.3)
    with pytest.raises(Unanswered, match=r"ssh did not copy .*/source within 0.3 s"):
        guest.push(str(source), "/inside")
    with pytest.raises(Unanswered, match=r"ssh did not copy /inside within 0.3 s"):
        guest.pull("/inside", str(tmp_path / "back"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "ssh"]
