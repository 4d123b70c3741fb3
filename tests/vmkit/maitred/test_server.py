"""maitred's methods, as each of three clients sees them: grpcio's, grpclib's with protobuf, and ours."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.vmkit.maitred.conftest import Call, RefusedError, ServerProgram, front
from tests.vmkit.maitred.google import CLASSES
from tests.vsh.live import DEADLINE_S, Vshd, wait_until
from vmkit.errors import MachineError
from vmkit.maitred import channel
from vmkit.maitred.client import Maitred
from vmkit.maitred.guest.serving import check_peer
from vmkit.maitred.guest.waiting import is_token_demanded
from vmkit.maitred.messages import EXITED, FAILED, LAUNCHED, SIGNALED
from vsh.address import Address
from vsh.errors import ConnectionLost
from vsh.registry import Entry
from vsh.token import make_token_text
from vshd.freeze import FreezeState, write_state

SHELL = "/bin/sh"


def test_kernel_and_space_are_the_guests(call: Call) -> None:
    version = call("GetKernelVersion")
    assert (version.kernel_release, version.kernel_version) == (os.uname().release, os.uname().version)
    assert call("GetAvailableSpace").available_space > 0
    assert call("PrepareToSuspend") == CLASSES["EmptyMessage"]()


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [("exit 3", EXITED, 3), ("true", EXITED, 0), ("kill -TERM $$", SIGNALED, 15)],
)
def test_program_that_is_waited_for_has_its_end(call: Call, script: str, status: int, code: int) -> None:
    reply = call("LaunchProcess", argv=[SHELL, "-c", script], wait_for_exit=True)
    assert (reply.status, reply.code) == (status, code)


# Each fact on a line of its own; the variables last.
FACTS = 'umask; pwd; readlink /proc/self/fd/0; echo $$; cut -d" " -f6 /proc/$$/stat; env | cut -d= -f1'


def test_program_has_a_session_and_few_variables(call: Call, tmp_path: Path) -> None:
    words = [SHELL, "-c", f"({FACTS}) > {tmp_path}/out"]
    assert call("LaunchProcess", argv=words, env={"ONE": "ü"}, wait_for_exit=True).code == 0
    mask, folder, stdin, pid, session, *names = (tmp_path / "out").read_text().splitlines()
    assert (mask, folder, stdin, session) == ("0022", "/", "/dev/null", pid)
    assert {"ONE", "PATH"} <= set(names) <= {"ONE", "PATH", "PWD", "OLDPWD", "SHLVL", "_"}


def test_program_that_is_not_waited_for_goes_on(call: Call, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    words = [SHELL, "-c", f"read line < {tmp_path}/in; echo $line > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/out"]
    reply = call("LaunchProcess", argv=words)
    assert (reply.status, reply.code) == (LAUNCHED, 0)
    # It was not ended with the call, and calls are answered meanwhile.
    assert call("GetAvailableSpace").available_space > 0
    (tmp_path / "in").write_text("word\n")
    wait_until((tmp_path / "out").exists, "the program goes on")


def test_program_that_is_missing_has_failed(call: Call) -> None:
    assert call("LaunchProcess", argv=["/nonexistent"]).status == FAILED
    assert call("LaunchProcess", argv=["/etc/hostname"], wait_for_exit=True).status == FAILED


def test_program_is_started_again_and_given_up(client: Maitred, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert client.launch_process([SHELL, "-c", f"echo started >> {out}"], respawn=True) is None
    wait_until(lambda: out.exists() and out.read_text().count("started") == 10, "ten starts")
    assert client.launch_process([SHELL, "-c", f"test $(grep -c . {out}) = 10"], wait_for_exit=True) == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "missing argv"),
        ({"argv": [""]}, "missing argv"),
        ({"argv": ["true"], "respawn": True, "wait_for_exit": True}, "exclude each other"),
        ({"argv": ["a\0b"]}, "null byte"),
        ({"argv": ["true"], "env": {"A=B": ""}}, "illegal environment variable name"),
    ],
)
def test_wrong_launch_is_refused(call: Call, fields: dict[str, object], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        call("LaunchProcess", **fields)
    assert caught.value.status == "INVALID_ARGUMENT"


def test_mount_has_its_errno_and_permissions(call: Call, running: ServerProgram, tmp_path: Path) -> None:
    target = str(tmp_path / "a/b")
    fields = {"source": "/dev/vdb", "fstype": "ext4", "mountflags": 1, "target": target, "create_target": True}
    assert call("Mount", **fields, permissions=0o700).error == 0
    assert running.notes[-1] == repr(("mount", b"/dev/vdb", target.encode(), b"ext4", 1))
    assert Path(target).stat().st_mode & 0o7777 == 0o700
    assert call("Mount", source="19", target=target).error == 19
    with pytest.raises(RefusedError, match="cannot change the permissions: No such file") as caught:
        call("Mount", source="/dev/vdb", target=f"{tmp_path}/none", permissions=0o700)
    assert caught.value.status == "INTERNAL"
    assert running.notes[-1] == repr(("unmount", f"{tmp_path}/none".encode()))
    # EINVAL: the disk has no file system. It is asked for once.
    assert call("Mount", source="22", target=target, mkfs_if_needed=True).error == 22
    assert running.notes[-2] == repr((b"mkfs.btrfs", b"--", b"22"))


def test_mount_9p_hands_the_connection_to_the_kernel(call: Call, running: ServerProgram, tmp_path: Path) -> None:
    assert call("Mount9P", port=564, target=f"{tmp_path}/shared").error == 0
    # nosuid, nodev.
    assert running.notes[-1] == repr(("mount", b"9p", f"{tmp_path}/shared".encode(), b"9p", 6))
    with pytest.raises(RefusedError, match="Failed to connect to vsock 2:565"):
        call("Mount9P", port=565, target=str(tmp_path))
    with pytest.raises(RefusedError, match="port must be between 1 and 4294967294, not 0"):
        call("Mount9P", target=str(tmp_path))


def test_clock_is_set(call: Call, running: ServerProgram) -> None:
    call("SetTime", time=CLASSES["Timestamp"](seconds=1_700_000_000, nanos=5))
    assert running.notes[-1] == repr(("set_time", 1_700_000_000_000_000_005))
    for wrong in ({"seconds": 0}, {"seconds": -1}, {"seconds": 1, "nanos": -1}, {"seconds": 1, "nanos": 1_000_000_000}):
        with pytest.raises(RefusedError) as caught:
            call("SetTime", time=CLASSES["Timestamp"](**wrong))
        assert caught.value.status == "INVALID_ARGUMENT"
    with pytest.raises(RefusedError, match="missing time"):
        call("SetTime")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../../../etc/passwd", "Europe/../UTC", "Europe", "No/Where"])
def test_time_zone_that_is_none_is_refused(call: Call, name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        call("SetTimezone", timezone_name=name)
    assert caught.value.status == "INVALID_ARGUMENT"


def test_user_is_made_or_gets_groups(call: Call, running: ServerProgram) -> None:
    reply = call("SetUpUser", username="bob", group_names=["kvm", "video"])
    assert (reply.success, reply.username) == (True, "bob")
    start = (b"useradd", b"--uid", b"1000", b"--create-home", b"--shell", b"/bin/bash")
    assert running.notes[-1] == repr((*start, b"--groups", b"kvm,video", b"bob"))
    assert call("SetUpUser", username="ann", uid=1001, group_names=["kvm"]).success
    assert running.notes[-1] == repr((b"usermod", b"--append", b"--groups", b"kvm", b"ann"))
    taken = call("SetUpUser", username="bob", uid=1001)
    assert (taken.success, taken.username) == (False, "ann")
    other = call("SetUpUser", username="ann", uid=1002)
    assert (other.success, other.failure_reason, other.username) == (False, "the user has the uid 1001", "ann")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "username must match"),
        ({"username": "Bob"}, "username must match"),
        ({"username": "bob;id"}, "username must match"),
        ({"username": "bob", "uid": 0}, "uid must be between 1 and 4294967294, not 0"),
        ({"username": "bob", "group_names": ["nowhere"]}, "the guest has no group nowhere"),
    ],
)
def test_wrong_user_is_refused(call: Call, fields: dict[str, object], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        call("SetUpUser", **fields)
    assert caught.value.status == "INVALID_ARGUMENT"


def test_shutdown_is_answered_before_the_guest_goes_down(call: Call, running: ServerProgram) -> None:
    before = running.notes.count(repr(("power_off",)))
    assert call("Shutdown") == CLASSES["EmptyMessage"]()
    wait_until(lambda: running.notes.count(repr(("power_off",))) == before + 1, "pid 1 is asked")


def test_bytes_that_are_no_message_are_refused(running: ServerProgram) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(DEADLINE_S)
        stranger.connect(str(running.path))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        # It hangs up, with or without the rest of what it had to say.
        while True:
            try:
                if not stranger.recv(65536):
                    break
            except ConnectionResetError:
                break


def test_answers_of_the_client_have_types(client: Maitred) -> None:
    assert client.get_kernel_version() == (os.uname().release, os.uname().version)
    assert client.get_available_space() > 0
    assert client.launch_process([SHELL, "-c", "kill -9 $$"], wait_for_exit=True) == -9
    assert client.set_up_user("ann", uid=1001) == "ann"
    with pytest.raises(MachineError, match="the guest cannot execute /nonexistent"):
        client.launch_process(["/nonexistent"])
    with pytest.raises(MachineError, match="the guest cannot mount /t: No such device"):
        client.mount("19", "/t", "ext4")
    with pytest.raises(MachineError, match="uid 1001 is that of another user: ann"):
        client.set_up_user("bob", uid=1001)


def test_client_waits_for_the_services_of_a_young_machine(running: ServerProgram, tmp_path: Path) -> None:
    with front(tmp_path / "vsock.sock", running.path, refusals=2) as address:
        address.entry = Entry(str(tmp_path), {"name": "young", "cid": 3, "started": time.time()})
        with Maitred(address, timeout_s=DEADLINE_S) as client:
            assert client.get_available_space() > 0


def test_guest_without_the_service_is_told_apart(running: ServerProgram, tmp_path: Path) -> None:
    with front(tmp_path / "vsock.sock", running.path, refusals=1) as address:
        address.entry = Entry(str(tmp_path), {"name": "old", "cid": 3, "started": time.time() - 1000})
        with Maitred(address, timeout_s=DEADLINE_S) as client, pytest.raises(MachineError) as caught:
            client.get_available_space()
    assert caught.value.brief.startswith("no maitred listens in ")
    assert "services" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="vshd connects as root, as in a guest")
def test_way_through_vshd_proves_the_token(
    running: ServerProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SOCKET", str(running.path))
    token = tmp_path / "token"
    token.write_bytes(make_token_text())
    token.chmod(0o600)
    vshd = Vshd(tmp_path, [f"--token_from=file:{token}"])
    try:
        address = Address.unix(str(vshd.path))
        address.token_file = str(token)
        with Maitred(address, timeout_s=DEADLINE_S) as client:
            assert client.get_available_space() > 0
            assert client.launch_process(["true"], wait_for_exit=True) == 0
    finally:
        vshd.stop()


def test_server_that_hangs_up_is_a_lost_connection(tmp_path: Path) -> None:
    """As maitred does over vsock where the machine has a token."""
    path = tmp_path / "closed.sock"
    with socket.socket(socket.AF_UNIX) as listening, front(tmp_path / "vsock.sock", path) as address:
        listening.bind(str(path))
        listening.listen()

        def hang_up() -> None:
            listening.accept()[0].close()

        closing = threading.Thread(target=hang_up)
        closing.start()
        with Maitred(address, timeout_s=DEADLINE_S) as client, pytest.raises(ConnectionLost, match="ended during"):
            client.get_available_space()
        closing.join(DEADLINE_S)


def test_machine_that_has_ended_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    (tmp_path / "ends").mkdir()
    brief = "the guest's kernel panicked: a reason"
    ending = {"name": "m", "pid": 4_000_000, "brief": brief, "expected": False, "details": "the last lines"}
    (tmp_path / "ends" / "m.json").write_text(json.dumps(ending))
    path = tmp_path / "closed.sock"
    with socket.socket(socket.AF_UNIX) as listening, front(tmp_path / "vsock.sock", path) as address:
        address.entry = Entry(str(tmp_path / "machines" / "m"), {"name": "m", "cid": 3, "pid": 4_000_000})
        listening.bind(str(path))
        listening.listen()

        def hang_up() -> None:
            listening.accept()[0].close()

        closing = threading.Thread(target=hang_up)
        closing.start()
        with Maitred(address, timeout_s=DEADLINE_S) as client, pytest.raises(ConnectionLost) as caught:
            client.get_available_space()
        closing.join(DEADLINE_S)
    assert str(caught.value) == f"lost the connection to machine 'm': {brief}"
    assert caught.value.details == "the last lines"


@pytest.mark.parametrize(("cid", "is_served"), [(2, True), (1, False), (3, False), (0, False)])
def test_host_alone_is_served_over_vsock(cid: int, is_served: bool) -> None:
    assert check_peer((cid, 1024), lambda: False) is is_served
    assert check_peer((cid, 1024), lambda: True) is False
    # Root's, by its mode.
    assert check_peer("", lambda: True) is True


def test_token_is_looked_for_at_the_boot_and_at_the_thaw(tmp_path: Path) -> None:
    line, state = tmp_path / "cmdline", tmp_path / "state"
    line.write_text("quiet vmkit.ready=7777\n")
    assert not is_token_demanded(str(line), str(state))
    write_state(str(state), FreezeState(bytes(32), is_frozen=True))
    assert is_token_demanded(str(line), str(state))
    write_state(str(state), FreezeState(bytes(32), is_frozen=False))
    assert is_token_demanded(str(line), str(state))
    write_state(str(state), FreezeState(None, is_frozen=False))
    assert not is_token_demanded(str(line), str(state))
    state.unlink()
    line.write_text("quiet vmkit.token=smbios\n")
    assert is_token_demanded(str(line), str(state))
    # Where it cannot be known.
    assert is_token_demanded(str(tmp_path / "none"), str(state))
