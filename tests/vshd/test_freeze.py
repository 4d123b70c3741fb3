"""Freezing a guest and thawing it: the state on disk, what a thaw may hold, its words, and a real vshd that is frozen.

That vshd runs in namespaces of its own, where it is root over names and mounts, and not over the host's clock.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, IS_VSOCK_GUEST, StartVshd, Vshd
from tests.vshd.test_init import needs_namespace
from vsh import freezing
from vsh.address import Address
from vsh.client import Client
from vsh.clock import ROUND_TRIP_LIMITS_NS
from vsh.errors import ExecError, VshError
from vsh.freezing import freeze, make_thaw, thaw
from vshd.flags import Options
from vshd.freeze import FreezeState, read_state, write_state
from vshd.log import Log
from vshd.naming import add_host, find_name, is_name
from vshd.pid1.duties import prove_wall
from vshd.services.table import Surroundings, find_service
from vshd.services.thaw import EXCHANGES_MAX, Guest, Thawing, find_fault, prepare
from vshd.session.refusal import RefusalError
from vshd.signals import Wakeup
from vshd.wire import messages
from vshd.wire.client import make_service_request
from vshd.wire.errors import TokenError
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.proof import render_token
from vshd.wire.requests import Freeze, Thaw

SECRET = bytes(range(32))
TOKEN = bytes(reversed(range(32)))
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--uts"]
not_over_vsock = pytest.mark.skipif(IS_VSOCK_GUEST, reason="a namespace's root cannot bind vshd's port")


# The state.


@pytest.mark.parametrize("token", [None, TOKEN])
def test_state_is_kept_for_the_user_alone(tmp_path: Path, token: bytes | None) -> None:
    path = tmp_path / "state"
    assert read_state(str(path)) is None
    write_state(str(path), FreezeState(SECRET, is_frozen=True))
    frozen = read_state(str(path))
    assert frozen is not None and (frozen.token, frozen.is_frozen) == (SECRET, True)
    write_state(str(path), FreezeState(token, is_frozen=False))
    thawed = read_state(str(path))
    assert thawed is not None and (thawed.token, thawed.is_frozen) == (token, False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_state_that_is_none_stops_the_daemon(tmp_path: Path) -> None:
    """Without a state that it understands, vshd must not serve as if the machine had never been frozen."""
    path = tmp_path / "state"
    for text in (b"", b"frozen", b"frozen none", b"thawed", b"thawed xyz", b"melted none\n", b"\xff" * 300):
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(TokenError):
            read_state(str(path))
    write_state(str(path), FreezeState(None, is_frozen=False))
    path.chmod(0o644)
    with pytest.raises(TokenError):
        read_state(str(path))
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError):
        read_state(str(link))


# What a thaw may hold.


def test_thaw_of_ours_has_no_fault_and_is_new_each_time() -> None:
    first, second = make_thaw("one", TOKEN), make_thaw("one", TOKEN)
    assert find_fault(first) == find_fault(second) == ""
    for field in ("entropy", "machine_id", "boot_id"):
        assert getattr(first, field) != getattr(second, field)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("entropy", b"", "entropy"),
        ("entropy", bytes(31), "entropy"),
        ("entropy", bytes(513), "entropy"),
        ("hostname", b"", "hostname"),
        ("hostname", b"a b", "hostname"),
        ("hostname", b"a\n", "hostname"),
        ("hostname", b"-a", "hostname"),
        ("hostname", b"a" * 65, "hostname"),
        ("hostname", "\xe4".encode(), "hostname"),
        ("machine_id", b"", "machine-id"),
        ("machine_id", b"A" * 32, "machine-id"),
        ("machine_id", b"a" * 33, "machine-id"),
        ("boot_id", b"", "boot_id"),
        ("boot_id", b"a" * 36, "boot_id"),
        ("boot_id", b"0" * 8 + b"-0000-0000-0000-00000000000\n", "boot_id"),
        ("token", b"x", "token"),
        ("token", bytes(33), "token"),
    ],
)
def test_malformed_thaw_changes_nothing(field: str, value: bytes, fault: str) -> None:
    request = make_thaw("one")
    setattr(request, field, value)
    guest = Recorder()
    with pytest.raises(RefusalError, match=f"^a thaw with .*{fault}"):
        prepare(request, guest, lambda: None, lambda: b"")
    assert guest.seen == []


@pytest.mark.parametrize(
    ("name", "is_good"), [(b"tiny", True), (b"a.b_c-9", True), (b".a", False), (b"", False), (b"a/b", False)]
)
def test_names_that_a_machine_can_have(name: bytes, is_good: bool) -> None:
    assert is_name(name) is is_good


def test_name_on_the_kernel_command_line() -> None:
    assert find_name("console=ttyS0 vmkit.name=two quiet\n") == b"two"
    assert find_name("vmkit.name=one vmkit.name=two") == b"two"
    assert find_name("quiet vmkit.name=a/b") == find_name("quiet") == b""


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (
            b"127.0.0.1 localhost\n127.0.1.1 tiny\n::1 x\n",
            b"127.0.0.1 localhost\n127.0.1.1 two\n::1 x\n",
        ),
        (b"127.0.0.1 localhost", b"127.0.0.1 localhost\n127.0.1.1 two\n"),
        (b"# 127.0.1.1 x\n", b"# 127.0.1.1 x\n127.0.1.1 two\n"),
        (b"", b"127.0.1.1 two\n"),
    ],
)
def test_hosts_file_has_the_name(hosts: bytes, expected: bytes) -> None:
    assert add_host(hosts, b"two") == expected
    assert add_host(expected, b"two") == expected


def test_wall_is_found_again_and_not_remembered() -> None:
    """Outside a guest the kernel refuses no connect to itself, so a layer that was on is missing now."""
    facts = b"WALL_TRANSPORT=off\nWALL_DAEMON=on\nWALL_KERNEL=on\n"
    proven = prove_wall(facts)
    assert proven.startswith(b"WALL_TRANSPORT=off\nWALL_DAEMON=on\nWALL_KERNEL=missing: ")
    assert prove_wall(b"WALL_KERNEL=off\nWALL_DAEMON=on\n") == b"WALL_KERNEL=off\nWALL_DAEMON=on\n"


# The words of a thaw, with a guest that only records.


class Recorder(Guest):
    """A guest that changes nothing, and knows what it was told. fails: the step that its kernel refuses."""

    __slots__ = ("fails", "seen")

    def __init__(self, fails: str = "") -> None:
        super().__init__("/nonexistent")
        self.fails = fails
        self.seen: list[tuple[str, object]] = []

    def _take(self, step: str, value: object) -> None:
        if step == self.fails:
            raise PermissionError(1, "Operation not permitted")
        self.seen.append((step, value))

    def add_entropy(self, data: bytes) -> None:
        self._take("entropy", data)

    def set_name(self, name: bytes) -> None:
        self._take("name", name)

    def set_machine_id(self, digits: bytes) -> None:
        self._take("machine_id", digits)

    def set_boot_id(self, text: bytes) -> None:
        self._take("boot_id", text)

    def set_clock(self, time_ns: int) -> None:
        self._take("clock", time_ns)

    def end_freeze(self, token: bytes | None) -> None:
        self._take("end", token)


def run_thaw(guest: Recorder, sent: bytes, rest: bytes = b"", *, token: bytes = b"") -> tuple[str, bytes]:
    """What a thaw ends with, and what its host has received, when the host sends this and leaves."""
    request = make_thaw("one", token)
    thawing = prepare(
        request, guest, lambda: guest.seen.append(("renew", None)), lambda: b"WALL_DAEMON=on\nWALL_KERNEL=on\n"
    )
    assert thawing.description == b"WALL_DAEMON=on WALL_KERNEL=on"
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setblocking(False)
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        end = thawing.run(theirs.detach(), rest, Wakeup(()), Log())
        received = b""
        # What was sent and not read resets the connection.
        with contextlib.suppress(ConnectionResetError):
            while data := ours.recv(4096):
                received += data
    return end, received


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def test_thaw_changes_entropy_first_and_the_state_last() -> None:
    guest = Recorder()
    end, received = run_thaw(guest, b"", word(5_000), token=TOKEN)
    assert end.startswith("not thawed") and len(received) == 8
    assert [step for step, _ in guest.seen] == ["entropy", "name", "machine_id", "boot_id", "clock"]
    guest = Recorder()
    ours, theirs = socket.socketpair()
    thawing = prepare(make_thaw("one", TOKEN), guest, lambda: guest.seen.append(("renew", None)), lambda: b"")
    theirs.setblocking(False)
    wakeup = Wakeup(())
    with ours:
        ours.settimeout(DEADLINE_S)
        thread = threading.Thread(target=thawing.run, args=(theirs.detach(), b"", wakeup, Log()))
        thread.start()
        for value in (5_000, 6_000, 0):
            ours.sendall(word(value))
            answer = ours.recv(8)
            assert abs(int.from_bytes(answer, "little") - time.time_ns()) < 10**10 if value else answer == bytes(8)
        assert ours.recv(1) == b""
        thread.join()
    assert guest.seen[4:] == [("clock", 5_000), ("clock", 6_000), ("end", TOKEN), ("renew", None)]


@pytest.mark.parametrize(
    "sent", [b"", b"abc", word(1 << 63), word(2**64 - 1), word(5) + word(0), b"x" * 9], ids=lambda sent: sent.hex()
)
def test_words_that_are_no_thaw_leave_the_machine_frozen(sent: bytes) -> None:
    guest = Recorder()
    end, received = run_thaw(guest, sent)
    assert end.startswith("not thawed") and received == b""
    assert not {"end", "renew", "clock"} & {step for step, _ in guest.seen}


@pytest.mark.parametrize(("late_ns", "words"), [(10**12, 9), (0, 24)])
def test_clock_is_set_again_while_the_words_are_slow(monkeypatch: pytest.MonkeyPatch, late_ns: int, words: int) -> None:
    """No word is as quick as this. The later ones may be slower, and all are fewer than the guest takes."""
    limits = [late_ns if limit_ns > ROUND_TRIP_LIMITS_NS[0] else 0 for limit_ns in ROUND_TRIP_LIMITS_NS]
    monkeypatch.setattr(freezing, "ROUND_TRIP_LIMITS_NS", limits)
    guest = Recorder()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    fd, wakeup = theirs.detach(), Wakeup(())
    with ours:
        thread = threading.Thread(target=lambda: Thawing(guest, None, lambda: None, b"").run(fd, b"", wakeup, Log()))
        thread.start()
        assert freezing._set_clock(ours.fileno(), time.monotonic() + DEADLINE_S) > 0
        ours.shutdown(socket.SHUT_WR)
        thread.join()
    assert [step for step, _ in guest.seen] == ["clock"] * words
    assert words < EXCHANGES_MAX


def test_thaw_that_sends_times_for_ever_is_ended() -> None:
    guest = Recorder()
    ours, theirs = socket.socketpair()
    thawing = Thawing(guest, None, lambda: None, b"")
    theirs.setblocking(False)
    ends: list[str] = []
    wakeup = Wakeup(())
    with ours:
        ours.settimeout(DEADLINE_S)
        fd = theirs.detach()
        thread = threading.Thread(target=lambda: ends.append(thawing.run(fd, b"", wakeup, Log())))
        thread.start()
        for _ in range(EXCHANGES_MAX):
            ours.sendall(word(7))
            assert len(ours.recv(8)) == 8
        assert ours.recv(1) == b""
        thread.join()
    assert ends == ["not thawed: the host sent too many times"]


@pytest.mark.parametrize("step", ["entropy", "name", "machine_id", "boot_id"])
def test_step_that_the_kernel_refuses_is_named(step: str) -> None:
    with pytest.raises(RefusalError, match=r"^cannot .*: Operation not permitted") as caught:
        prepare(make_thaw("one"), Recorder(step), lambda: None, lambda: b"")
    assert caught.value.failure.error == 1


@pytest.mark.parametrize("step", ["clock", "end"])
def test_clock_or_end_that_fails_is_no_thaw(step: str) -> None:
    guest = Recorder(step)
    end, received = run_thaw(guest, word(5) if step == "clock" else word(0))
    assert (end, received) == ("not thawed: Operation not permitted", b"")
    assert ("renew", None) not in guest.seen


# The request.


def test_request_finds_the_services() -> None:
    for request, name in (
        (make_service_request(freeze=Freeze(secret=SECRET)), "freeze"),
        (make_service_request(thaw=make_thaw("one")), "thaw"),
    ):
        parsed = SetupConnectionRequest()
        parsed.merge(request.encode())
        asked = find_service(parsed)
        assert asked is not None
        assert (asked.service.name, asked.user, asked.describe()) == (name, b"root", name)
        assert asked.service.is_hosts


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_freeze_needs_a_whole_secret_and_a_file(tmp_path: Path, secret: bytes) -> None:
    options = Options()
    around = Surroundings(options, is_frozen=False, facts=b"", renew=lambda: None)
    for path, freeze_secret in (("", SECRET), (str(tmp_path / "state"), secret)):
        options.freeze_file = path
        asked = find_service(make_service_request(freeze=Freeze(secret=freeze_secret)))
        assert asked is not None
        with pytest.raises(RefusalError):
            asked.open(-1, around)
    assert not list(tmp_path.iterdir())


# A real vshd.


@pytest.fixture
def freezable(start_vshd: StartVshd, tmp_path: Path) -> Vshd:
    """A vshd that can be frozen, and whose kernel lets nothing of the host be changed."""
    return start_vshd(f"--freeze_file={tmp_path}/state", wrapper=NAMESPACE)


def address_of(vshd: Vshd, secret: bytes | None = None) -> Address:
    address = Address.unix(str(vshd.path))
    if secret is not None:
        path = vshd.path.with_name(f"token-{secret[:4].hex()}")
        path.write_bytes(render_token(secret))
        path.chmod(0o600)
        address.token_file = str(path)
    return address


def run_echo(address: Address) -> bytes:
    return Client(address, timeout_s=DEADLINE_S).run(["echo", "hi"]).stdout


@needs_namespace
@not_over_vsock
def test_frozen_vshd_serves_nothing_but_a_thaw(freezable: Vshd) -> None:
    assert run_echo(address_of(freezable)) == b"hi\n"
    freeze(address_of(freezable), SECRET, timeout_s=DEADLINE_S)
    with pytest.raises(VshError, match="demands its token"):
        run_echo(address_of(freezable))
    with pytest.raises(VshError, match="did not prove"):
        run_echo(address_of(freezable, TOKEN))
    with pytest.raises(ExecError, match="this machine is frozen") as caught:
        run_echo(address_of(freezable, SECRET))
    assert caught.value.kind == messages.FROZEN
    with pytest.raises(ExecError, match="this machine is frozen"):
        freeze(address_of(freezable, SECRET), TOKEN, timeout_s=DEADLINE_S)
    legacy = Client(address_of(freezable), timeout_s=DEADLINE_S, extended=False)
    with pytest.raises(VshError, match="cannot prove"):
        legacy.run(["true"])


@needs_namespace
@not_over_vsock
def test_thaw_that_the_kernel_refuses_leaves_the_machine_frozen(freezable: Vshd) -> None:
    """The namespace's root may not feed the host's random numbers: nothing behind that step is done."""
    freeze(address_of(freezable), SECRET, timeout_s=DEADLINE_S)
    with pytest.raises(ExecError, match="cannot add entropy: Operation not permitted"):
        thaw(address_of(freezable, SECRET), make_thaw("other"), timeout_s=DEADLINE_S)
    with pytest.raises(VshError, match="did not prove"):
        thaw(address_of(freezable, TOKEN), make_thaw("other"), timeout_s=DEADLINE_S)
    with pytest.raises(VshError, match="demands its token"):
        thaw(address_of(freezable), make_thaw("other"), timeout_s=DEADLINE_S)
    with pytest.raises(ExecError, match="a thaw with a hostname"):
        thaw(address_of(freezable, SECRET), Thaw(entropy=bytes(64)), timeout_s=DEADLINE_S)
    with pytest.raises(ExecError, match="this machine is frozen"):
        run_echo(address_of(freezable, SECRET))


@needs_namespace
@not_over_vsock
@pytest.mark.parametrize("flag", ["--allow_legacy_clients", "--spare_time=5"])
def test_no_flag_lets_a_client_into_a_frozen_machine(start_vshd: StartVshd, tmp_path: Path, flag: str) -> None:
    """A spare that was made before the freeze knows no secret, and must not serve after it."""
    vshd = start_vshd(f"--freeze_file={tmp_path}/state", flag, wrapper=NAMESPACE)
    assert run_echo(address_of(vshd)) == b"hi\n"
    freeze(address_of(vshd), SECRET, timeout_s=DEADLINE_S)
    for is_extended in (True, False):
        with pytest.raises(VshError):
            Client(address_of(vshd), timeout_s=DEADLINE_S, extended=is_extended).run(["true"])


@needs_namespace
@not_over_vsock
def test_vshd_that_is_started_again_is_as_frozen_as_the_last(start_vshd: StartVshd, tmp_path: Path) -> None:
    write_state(str(tmp_path / "state"), FreezeState(SECRET, is_frozen=True))
    vshd = start_vshd(f"--freeze_file={tmp_path}/state", wrapper=NAMESPACE)
    with pytest.raises(ExecError, match="this machine is frozen"):
        run_echo(address_of(vshd, SECRET))
    write_state(str(tmp_path / "state"), FreezeState(TOKEN, is_frozen=False))
    vshd = start_vshd(f"--freeze_file={tmp_path}/state", wrapper=NAMESPACE)
    assert run_echo(address_of(vshd, TOKEN)) == b"hi\n"
    with pytest.raises(VshError, match="did not prove"):
        run_echo(address_of(vshd, SECRET))


@not_over_vsock
def test_machine_that_was_not_frozen_cannot_be_thawed(start_vshd: StartVshd, tmp_path: Path) -> None:
    for flags in ([], [f"--freeze_file={tmp_path}/state"]):
        vshd = start_vshd(*flags)
        with pytest.raises(ExecError, match="this machine is not frozen"):
            thaw(address_of(vshd), make_thaw("other"), timeout_s=DEADLINE_S)
    assert not (tmp_path / "state").exists()


@not_over_vsock
def test_vshd_without_a_file_cannot_be_frozen(vshd: Vshd) -> None:
    with pytest.raises(ExecError, match="without --freeze_file"):
        freeze(address_of(vshd), SECRET, timeout_s=DEADLINE_S)
    assert run_echo(address_of(vshd)) == b"hi\n"


@not_over_vsock
@pytest.mark.skipif(os.geteuid() != 0, reason="vshd must be root to serve another user")
def test_client_that_may_not_be_root_cannot_freeze(start_vshd: StartVshd, tmp_path: Path) -> None:
    for flag in ("--allow_user=nobody", "--noallow_to_switch_user"):
        extra = ["--default_user=nobody"] if flag.startswith("--no") else []
        vshd = start_vshd(f"--freeze_file={tmp_path}/state", flag, *extra)
        with pytest.raises(ExecError, match="allowed"):
            freeze(address_of(vshd), SECRET, timeout_s=DEADLINE_S)
    assert not (tmp_path / "state").exists()
