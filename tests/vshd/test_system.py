"""The systemd of another root as pid 1, with vshd beside it: a script stands for systemd, in a PID namespace."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest

from tests.vsh.live import DEADLINE_S, ended, wait_until
from tests.vshd.test_init import Guest, find_others, list_children, needs_namespace, read_log
from tests.vshd.test_root import BUSYBOX, KEEP, PROC_AND_DEV, make_folder
from vsh.address import Address
from vsh.power_off import ask_to_power_off
from vshd.carry.records import FIELDS, HAS_WRITER, JOURNAL
from vshd.pid1.duties import DutyError, take_duties
from vshd.pid1.journal import TO_LINES, TO_STREAM
from vshd.pid1.system import POWER_OFF, find_wanted

# As the kernel shows a set of signals.
PENDING = f"{1 << (POWER_OFF - 1):016x}"
# Takes the signal late, as systemd does: until then it is blocked, and must be kept.
SYSTEMD = f"""#!/bin/sh
while read -r name value; do
    [ "$name" != ShdPnd: ] || pending=$value
done < /proc/self/status
[ "$pending" != {PENDING} ] || exit
sleep 0.1
exec /sbin/init
"""
# pid 1 makes the namespace of the root, as /init does, and goes on as vshd's init.
MAKE_NAMESPACE = """
import os
reading, writing = os.pipe()
keeper = os.fork()
if not keeper:
    os.dup2(writing, 1)
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", "sh", "-c", {script!r}, "sh", {folder!r}])
os.close(writing)
assert os.read(reading, 16) == b"ready\\n"
real = init.main
init.main = lambda argv: real([*argv, f"--root_namespace=/proc/{{keeper}}/ns/mnt"])
"""


needs_root = pytest.mark.root
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="no busybox to make a root of")


class SystemGuest(Guest):
    """A guest with a root of its own."""

    def __init__(self, folder: Path, root: Path, *flags: str) -> None:
        mounts = f"{PROC_AND_DEV} mount -t tmpfs tmpfs run &&"
        script = f'mount --bind "$1" "$1" && {KEEP.format(mounts=mounts).replace("read -r _", "exec sleep 1000")}'
        super().__init__(folder, *flags, script=MAKE_NAMESPACE.format(script=script, folder=str(root)))

    @property
    def keepers(self) -> list[int]:
        """The process beside pid 1 that keeps vshd."""
        return [pid for pid in list_children(self.pid) if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    @property
    def vshd(self) -> list[int]:
        return [child for pid in self.keepers for child in list_children(pid)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with systemd where Debian has it."""
    folder = make_folder(tmp_path / "root")
    for name in ("sbin", "usr/lib/systemd"):
        (folder / name).mkdir(parents=True)
    (folder / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
    program = folder / "usr/lib/systemd/systemd"
    program.write_text(SYSTEMD)
    program.chmod(0o755)
    return folder


class StartGuest(Protocol):
    """The fixture start_guest."""

    def __call__(self, root: Path, *flags: str) -> SystemGuest: ...


@pytest.fixture
def start_guest(tmp_path: Path) -> Iterator[StartGuest]:
    guests: list[SystemGuest] = []

    def start(root: Path, *flags: str) -> SystemGuest:
        guests.append(SystemGuest(tmp_path, root, *flags))
        return guests[-1]

    yield start
    for guest in guests:
        with ended(guest.process):
            pass


@needs_namespace
@needs_root
@needs_busybox
def test_systemd_of_the_root_is_pid_1_and_vshd_goes_on_beside_it(root: Path, start_guest: StartGuest) -> None:
    guest = start_guest(root, "--init_system=auto")
    guest.wait_until_ready()
    wait_until(lambda: guest.run("--", "readlink", "/proc/1/exe").stdout == b"/bin/busybox\n", "the script is pid 1")
    environment = guest.run("--", "cat", "/proc/1/environ").stdout.split(b"\0")
    # sh sets what is more.
    assert {b"HOME=/", b"TERM=linux"} <= set(environment)
    assert not [word for word in environment if word.startswith((b"PYTHON", b"VSH"))]
    assert guest.run("--", "cat", "/proc/self/oom_score_adj").stdout == b"0\n"
    (first,) = guest.vshd
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: guest.vshd and guest.vshd != [first], "another vshd runs")
    wait_until(lambda: guest.run("--", "pwd").stdout == b"/root\n", "it serves in the root")
    ask_to_power_off(Address.unix(str(guest.socket)), timeout_s=DEADLINE_S)
    # The script ends when it finds the signal, which has waited for it.
    assert guest.finish_with_errors() == ["vmkit-init: error: vshd ended with -9; it is started again at once"]
    assert not guest.called.exists()


@needs_namespace
@needs_root
@needs_busybox
def test_systemd_gets_the_place_of_the_log_and_a_collector_still_starts(
    root: Path, start_guest: StartGuest, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    guest = start_guest(root, "--init_system=systemd", f"--init_log={log}", f"--logs={tmp_path / 'handed'}")
    guest.wait_until_ready()
    assert not log.exists()
    read_log(guest)
    assert len(guest.vshd) == 2


@needs_namespace
@needs_root
@needs_busybox
def test_lines_of_an_old_journal_reach_the_collector(root: Path, start_guest: StartGuest, tmp_path: Path) -> None:
    flags = ("--init_system=auto", f"--init_log={tmp_path / 'log'}", f"--logs={tmp_path / 'handed'}")
    guest = start_guest(root, *flags)
    guest.wait_until_ready()
    run = Path(f"/proc/{guest.pid}/root/run")
    # pid 1 enters the root in its own time.
    setting = run / "systemd/journald.conf.d/vmkit.conf"
    wait_until(setting.exists, "pid 1 is in the root")
    assert setting.read_text() == TO_LINES
    path = run / "systemd/journal/syslog"
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.connect(str(path))
        journal.send(b"<30>Nov 30 12:00:00 app[7]: hello")
    (record,) = [record for record in read_log(guest) if record.source == JOURNAL]
    assert (record.text, record.flags) == (b"<30>Nov 30 12:00:00 app[7]: hello", HAS_WRITER)


@needs_namespace
@needs_root
@needs_busybox
def test_journal_connects_and_connects_again_when_the_collector_died(
    root: Path, start_guest: StartGuest, tmp_path: Path
) -> None:
    (root / "usr/lib/systemd/systemd-journald").write_bytes(b"\x7fELF...\0Journal.ForwardToSocket\0...")
    flags = ("--init_system=auto", f"--init_log={tmp_path / 'log'}", f"--logs={tmp_path / 'handed'}")
    guest = start_guest(root, *flags)
    guest.wait_until_ready()
    run = Path(f"/proc/{guest.pid}/root/run")
    # pid 1 enters the root in its own time.
    setting = run / "systemd/journald.conf.d/vmkit.conf"
    wait_until(setting.exists, "pid 1 is in the root")
    assert setting.read_text() == TO_STREAM
    path = run / "systemd/journal/vmkit"
    assert path.stat().st_mode & 0o777 == 0o600

    def send(text: bytes) -> bool:
        """As the journal does it, whose connection breaks while the next collector is due; whether it has come."""
        with socket.socket(socket.AF_UNIX) as journal:
            journal.connect(str(path))
            with suppress(BrokenPipeError):
                journal.sendall(b"MESSAGE=%s\n_PID=9\n_UID=8\n_GID=7\n\n" % text)
        return any(record.text.endswith(b"\0" + text) for record in read_log(guest) if record.source == FIELDS)

    wait_until(lambda: send(b"one"), "the collector has the record")
    wait_until(lambda: len(find_others(guest)) == 1, "the collector alone is beside vshd")
    (collector,) = find_others(guest)
    os.kill(collector, signal.SIGKILL)
    wait_until(lambda: send(b"two"), "the next collector has the record")


@needs_namespace
@needs_root
@needs_busybox
def test_keeper_ends_with_the_guest_and_ends_nothing_itself(root: Path, start_guest: StartGuest) -> None:
    guest = start_guest(root, "--init_system=systemd")
    guest.wait_until_ready()
    (keeper,) = guest.keepers
    os.kill(keeper, signal.SIGTERM)
    wait_until(lambda: not guest.keepers or guest.keepers != [keeper], "the keeper has ended")
    assert guest.run("--", "pwd").stdout == b"/root\n"


@needs_namespace
@needs_root
@needs_busybox
@pytest.mark.parametrize("flag", ["--init_system=auto", "--init_system=none", "--init_hook="])
def test_root_without_systemd_keeps_vshds_init(root: Path, start_guest: StartGuest, flag: str) -> None:
    if flag.endswith("auto"):
        (root / "sbin/init").unlink()
        (root / "sbin/init").symlink_to("/bin/busybox")
    guest = start_guest(root, flag)
    wait_until(lambda: guest.run("--", "pwd").stdout == b"/root\n", "vshd serves in the root")
    assert guest.run("--", "readlink", "/proc/1/exe").stdout != b"/bin/busybox\n"
    ask_to_power_off(Address.unix(str(guest.socket)), timeout_s=DEADLINE_S)
    guest.finish()
    assert guest.called.read_text() == "poweroff -f\n"


@needs_namespace
@needs_root
@needs_busybox
@pytest.mark.parametrize(
    ("target", "line"),
    [
        (None, "the root has no systemd: its /sbin/init is missing"),
        ("/bin/busybox", "the root has no systemd: its /sbin/init is /bin/busybox"),
        ("/usr/lib/systemd/systemd", "cannot run the root's /sbin/init: Exec format error"),
    ],
)
def test_systemd_that_is_wanted_and_does_not_run(
    root: Path, start_guest: StartGuest, target: str | None, line: str
) -> None:
    (root / "sbin/init").unlink()
    if target is not None:
        (root / "sbin/init").symlink_to(target)
    (root / "usr/lib/systemd/systemd").write_text("no program\n")
    guest = start_guest(root, "--init_system=systemd")
    assert f"vmkit-init: error: {line}" in guest.finish_with_errors()
    assert guest.called.read_text() == "poweroff -f\n"


def test_word_of_the_kernels_command_line_comes_before_the_images() -> None:
    assert take_duties(["--init_system=systemd"])[0].system == "systemd"
    assert find_wanted("quiet", "systemd") == "systemd"
    assert find_wanted("quiet vmkit.init=systemd vmkit.init=none", "auto") == "none"
    with pytest.raises(DutyError, match="an init must be one of auto, systemd, none, not 'openrc'"):
        find_wanted("vmkit.init=openrc", "auto")
