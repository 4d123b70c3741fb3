"""A root with systemd: it is pid 1, and vshd is there before it, beside it, and when it fails."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import DEADLINE_S, Run
from tests.guest.systems import make_system
from tests.guest.test_crashes import await_crashes, read_crashes
from tests.guest.test_syslog import read_syslog
from vmkit.machine.parts.system import REMOUNT, WAITERS
from vmkit.machine.stop import open_control
from vmkit.machine.words import Watch
from vsh.registry import Entry, find_machine

# A Debian is installed and boots under emulation: minutes.
pytestmark = pytest.mark.slow
# systemd and the overlay of what it writes.
MEMORY = ("--memory", "512")
# A busy host emulates some minutes of boot.
PATIENCE = ("--timeout", "600")

# A user writes to the journal's own socket, by its native protocol, and tries those of vmkit.
FORGE = """
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect("/run/systemd/journal/socket")
s.send(b"MESSAGE=forged\\nSYSLOG_IDENTIFIER=systemd\\n_UID=0\\n_SYSTEMD_UNIT=ssh.service\\n")
for kind, path in ((socket.SOCK_STREAM, "journal/vmkit"), (socket.SOCK_DGRAM, "journal/syslog"),
                   (socket.SOCK_STREAM, "private")):
    try:
        socket.socket(socket.AF_UNIX, kind).connect("/run/systemd/" + path)
    except OSError:
        print("refused")
"""

# systemd forgets the unit as soon as it has failed.
RUN = ("systemd-run", "--quiet", "--collect")


@pytest.fixture(scope="module")
def disk(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The raw disk of a Debian."""
    raw = make_system(tmp_path_factory.mktemp("systems"))
    yield raw
    # Some hundred megabytes.
    raw.unlink()


def test_systemd_is_pid_1_and_vshd_stays_beside_it(disk: Path, up: Run, vsh: Run, vmkit: Run) -> None:
    done = up(str(disk), "--name", "sysd", "--quiet", "--cores", *MEMORY)
    assert done.stdout.startswith(b"sysd is ready"), done.stderr.decode()
    where = ("--vm_name", "sysd")
    assert vsh(*where, "--", "readlink", "/proc/1/exe").stdout == b"/usr/lib/systemd/systemd\n"
    entry = find_machine(name="sysd")
    assert entry is not None
    assert entry.record["init"] == "systemd"
    # Nothing waits for the disks of its fstab, or for a network. What no such guest can do, fails in no container.
    done = vmkit("wait", "--booted", "sysd", *PATIENCE, timeout_s=1300)
    assert (done.returncode, done.stdout) == (0, b"sysd has booted: running\n"), done.stderr.decode()
    check_waits(where, vsh)
    # All of it is the root's.
    script = "env; cat /proc/self/oom_score_adj; cat /proc/self/mounts; cat /proc/self/cgroup"
    seen = vsh(*where, "--", "sh", "-c", script).stdout.decode()
    assert "vmkit" not in seen
    assert "PYTHON" not in seen
    assert "\n0\n" in seen
    assert "0::/init.scope" in seen
    check_journal(where, vsh, vmkit)
    check_failure("sysd", vsh)
    check_core("sysd", vsh)
    # vshd is started again, and goes on when systemd does anew, and when all units end.
    kill = "kill -9 $(awk '$1 == \"PPid:\" { print $2 }' /proc/$PPID/status)"
    vsh(*where, "--", "sh", "-c", kill)
    assert vsh(*where, "--", "systemctl", "daemon-reexec").returncode == 0
    assert vsh(*where, "--", "systemctl", "--no-block", "isolate", "rescue.target").returncode == 0
    assert vsh(*where, "--", "sh", "-c", "until systemctl -q is-active rescue.target; do sleep 1; done").returncode == 0
    # A unit that fails is named.
    assert vsh(*where, "--", "systemd-run", "--unit=broken", "false").returncode == 0
    done = vmkit("wait", "--booted", "sysd", "--json")
    assert b"broken.service" in done.stdout
    assert done.returncode == 1
    assert b"failed units: broken.service" in vmkit("status", "sysd").stdout
    # No failure of before is a crash once more.
    units = [one["crash"]["service"]["unit"] for one in await_crashes("sysd", 3)]
    assert sorted(units) == ["bad.service", "broken.service", "dumps.service"]
    done = vmkit("down", "sysd")
    assert (done.returncode, done.stdout) == (0, b"sysd is down\n")
    assert b"did not power off" not in done.stderr


def check_waits(where: tuple[str, str], vsh: Run) -> None:
    """Nothing of the boot has waited up to its deadline, as systemd itself recorded it, and no unit can do so.

    A device that is missing is waited for 90 s, a network for 120 s. No clock counts: a host may be busy.
    """
    for result in ("timeout", "dependency"):
        done = vsh(*where, "--", "journalctl", "--boot", "--quiet", "--output=cat", f"JOB_RESULT={result}")
        assert (done.returncode, done.stdout) == (0, b""), done
    # The journal has the results of jobs.
    assert vsh(*where, "--", "journalctl", "--boot", "--quiet", "--output=cat", "JOB_RESULT=done").stdout
    shown = vsh(*where, "--", "systemctl", "show", "--value", "--property=LoadState", *WAITERS, REMOUNT).stdout
    assert shown.split() == [b"masked"] * (len(WAITERS) + 1)
    # None of it is for a disk of its fstab.
    units = vsh(*where, "--", "systemctl", "list-units", "--all", "--plain", "--no-legend", "--full").stdout.decode()
    assert "66666666" not in units, units


def check_failure(name: str, vsh: Run) -> None:
    """A service that fails is a crash, the first of the machine."""
    # The journal has the words before systemd reports the failure.
    words = ("sh", "-c", "echo last words; journalctl --sync; exit 3")
    assert vsh("--vm_name", name, "--", *RUN, "--unit=bad", *words).returncode == 0
    (bad,) = await_crashes(name, 1)
    service = bad["crash"]["service"]
    assert (bad["crash"]["kind"], service["unit"], service["result"]) == ("service", "bad.service", "exit-code")
    assert (service["end"], service["status"], service["restarts"], service["restarted"]) == ("exited", 3, 0, False)
    assert len(service["invocation"]) == 32
    assert "last words" in service["log"]


def check_core(name: str, vsh: Run) -> None:
    """A service whose main process leaves a core is one crash with it, the second of the machine."""
    # systemd replaces `$$` by `$`.
    words = ("sh", "-c", "kill -SEGV $$$$; sleep 600")
    assert vsh("--vm_name", name, "--", *RUN, "--unit=dumps", *words).returncode == 0
    end_s = time.monotonic() + DEADLINE_S
    while (dumped := await_crashes(name, 2)[1]["crash"])["kind"] != "core" or dumped["service"] is None:
        assert time.monotonic() < end_s, dumped
        time.sleep(0.05)
    assert dumped["program"]["pid"] == dumped["service"]["pid"]
    assert (dumped["service"]["unit"], dumped["service"]["result"]) == ("dumps.service", "core-dump")
    assert (dumped["service"]["end"], dumped["service"]["status"]) == ("dumped", 11)
    assert len(read_crashes(name)) == 2


def check_journal(where: tuple[str, str], vsh: Run, vmkit: Run, *, has_units: bool = True) -> None:
    """What the journal gets is on the host, each record with its unit and its writer, and no user writes as root.

    has_units: whether it is one that sends records by ForwardToSocket, and not lines.
    """
    run = ("systemd-run", "--wait", "--quiet", "--unit=job")
    for command in (
        (*run, "sh", "-c", "echo '<3>of a job'"),
        ("logger", "-t", "app", "-p", "daemon.err", "of root"),
        ("sh", "-c", "echo of the kernel > /dev/kmsg"),
    ):
        assert vsh(*where, "--", *command).returncode == 0
    assert vsh(*where, "--user=nobody", "--", "python3", "-c", FORGE).stdout == b"refused\n" * 3
    records = read_syslog(vmkit, where[1])
    found = {record["text"]: record for record in records if record["source"] == "journal"}
    keys = ("ident", "priority", "facility", "uid")
    assert [found["of a job"][key] for key in keys] == ["sh", "err", "daemon", 0]
    assert found["of a job"].get("unit") == ("job.service" if has_units else None)
    assert [found["of root"][key] for key in keys] == ["app", "err", "daemon", 0]
    # `nobody` says what it likes, but not who it is.
    assert [found["forged"][key] for key in ("ident", "uid")] == ["systemd", 65534]
    assert "unit" not in found["forged"] or found["forged"]["unit"] == "init.scope"
    # From the start of the boot on, and the kernel's records once.
    units = {record.get("unit") for record in found.values() if record["pid"] == 1}
    assert ("init.scope" in units) == has_units, units
    assert [record["source"] for record in records if record["text"] == "of the kernel"] == ["kernel"]


def test_journal_of_debian_12_reaches_the_host(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, up: Run, vsh: Run, vmkit: Run
) -> None:
    """Its systemd 252 knows no ForwardToSocket, and sends lines as to a syslog daemon."""
    raw = make_system(tmp_path_factory.mktemp("systems"), suite="bookworm")
    done = up(str(raw), "--name", "older", "--cores", "--wait-booted", *PATIENCE, *MEMORY, timeout_s=1300)
    assert b"older has booted: " in done.stdout, done.stderr.decode()
    where = ("--vm_name", "older")
    assert vsh(*where, "--", "systemctl", "--version").stdout.startswith(b"systemd 252 ")
    check_journal(where, vsh, vmkit, has_units=False)
    check_failure("older", vsh)
    raw.unlink()


def test_machine_that_boots_is_powered_off_at_once(disk: Path, up: Run, vmkit: Run, vsh: Run) -> None:
    """The request comes before systemd takes signals, and waits for it. The disk is a qcow2."""
    packed = disk.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, packed], check=True)
    assert up(str(packed), "--name", "early", *MEMORY).returncode == 0
    done = vmkit("down", "early")
    assert (done.returncode, done.stdout) == (0, b"early is down\n")
    assert b"did not power off" not in done.stderr
    # The guest's own power-off is expected, and ends the machine as `down` does.
    done = up(str(packed), "--name", "own", "--wait-booted", *PATIENCE, *MEMORY, timeout_s=1300)
    assert b"own has booted: running" in done.stdout, done.stderr.decode()
    vsh("--vm_name", "own", "--", "systemctl", "poweroff")
    done = vmkit("wait", "own")
    assert b"powered off" in done.stdout or b"is running" in done.stderr, done
    # Without systemd the same root has vmkit's init.
    assert up(str(packed), "--name", "plain", "--init", "none").returncode == 0
    assert b"vshd.pid1.init" in vsh("--vm_name", "plain", "--", "cat", "/proc/1/cmdline").stdout
    packed.unlink()


def test_reboot_of_a_systemd_is_a_reboot_where_it_is_wanted(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, up: Run, vsh: Run, vmkit: Run
) -> None:
    """systemd stops what runs, its disk keeps what was written, and the session learns of the reboot."""
    raw = make_system(tmp_path_factory.mktemp("systems"), room_mib=256)
    where = ("--vm_name", "again")

    def look() -> tuple[Entry, str]:
        """The machine, and its boot."""
        seen = vsh(*where, "--", "cat", "/proc/1/comm", "/proc/sys/kernel/random/boot_id").stdout.decode()
        init, boot_id = seen.splitlines()
        entry = find_machine(name="again")
        assert entry is not None
        assert (init, entry.record["init"]) == ("systemd", "systemd")
        return entry, boot_id

    assert vmkit("create", "again", str(raw), "--accel", "tcg", *MEMORY).returncode == 0
    done = up("again", "--on-reset=restart", "--wait-booted", *PATIENCE, timeout_s=1300)
    assert b"again has booted: running" in done.stdout, done.stderr.decode()
    first, first_boot = look()
    told: list[str] = []
    with open_control(first, lambda: told.append("reboot")) as control:
        control.ask(Watch())
        done = vsh(*where, "--", "sh", "-c", "echo kept > /etc/kept; systemctl reboot; exec sleep 6000", timeout_s=600)
        assert done.returncode == 123, done
        # systemd may need longer from the end of the session to the reset than vsh waits for its reason.
        assert any(word in done.stderr for word in (b"the guest reboots", b"vshd is shutting down")), done
        # It is ready again, and boots as before.
        done = up("again", "--reuse", "--wait-booted", *PATIENCE, timeout_s=1300)
        assert b"again has booted: running" in done.stdout, done.stderr.decode()
        later, later_boot = look()
        assert later_boot != first_boot
        assert (later.pid, later.cid, later.record["reboots"]) == (first.pid, first.cid, 1)
        assert vsh(*where, "--", "cat", "/etc/kept").stdout == b"kept\n"
        done = vmkit("down", "again")
        assert (done.stdout, b"did not power off" in done.stderr) == (b"again is down\n", False)
        assert control.wait_end(60) is not None
    assert told == ["reboot"]
    assert vmkit("rm", "again").returncode == 0
    raw.unlink()


def test_cloud_init_does_what_user_data_says(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, up: Run, vsh: Run, vmkit: Run
) -> None:
    """It is part of the boot. A reboot inside ends the machine."""
    folder = tmp_path_factory.mktemp("systems")
    raw = make_system(folder, "cloud-init")
    (folder / "user-data").write_text("#cloud-config\nusers: [{name: ann, uid: 777}]\nruncmd: [[touch, /done]]\n")
    words = ("--name", "cloud", "--user-data", str(folder / "user-data"), "--wait-booted", *PATIENCE)
    done = up(str(raw), *words, *MEMORY, timeout_s=1300)
    assert b"cloud has booted: " in done.stdout, done.stderr.decode()
    where = ("--vm_name", "cloud")
    assert vsh(*where, "--", "cloud-init", "status", "--wait", timeout_s=600).stdout.strip() == b"status: done"
    done = vsh(*where, "--user", "ann", "--", "sh", "-c", "id -u; hostname; ls /done")
    assert done.stdout.decode().splitlines() == ["777", "cloud", "/done"]
    vsh(*where, "--", "systemctl", "reboot")
    done = vmkit("wait", "cloud")
    # It may be over already.
    assert b"reset" in done.stdout or b"is running" in done.stderr
