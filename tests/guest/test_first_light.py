"""`vmkit up && vsh --cid 3`, for real: what a newcomer does on the first day."""

import hashlib
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import vmkit as vmkit_package
from tests.guest.conftest import Run, is_pools
from vsh.registry import find_machine, read_machines

BIN = Path(sys.executable).parent


def test_up_then_vsh_by_cid(own_registry: None, up: Run, vsh: Run, vmkit: Run, folders: Path) -> None:
    shutil.rmtree(folders / "state" / "tiny", ignore_errors=True)
    done = up()
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert text.startswith("tiny is ready: CID 3, accelerator tcg, backend user, ")
    assert "a shell:  vsh --cid 3\n" in text
    assert "stop it:  vmkit down tiny\n" in text
    assert vsh("--cid", "3", "--", "uname", "-s").stdout == b"Linux\n"
    assert vsh("--cid=3", "--", "sh", "-c", "echo out; echo err >&2; exit 7").returncode == 7
    assert vmkit("down", "tiny").stdout == b"tiny is down\n"
    assert list((folders / "own" / "machines").iterdir()) == []
    files = (path for path in (folders / "state").glob("tiny/**/*") if path.is_file())
    left = {path.name: path.read_text(errors="replace")[-2000:] for path in files}
    assert not (folders / "state" / "tiny").exists(), f"a guest that powered off left evidence of a bad end: {left}"


def test_next_command_works_when_pasted_without_the_programs_on_path(up: Run) -> None:
    path = ":".join(part for part in os.environ["PATH"].split(":") if not Path(part, "vsh").exists())
    text = up("--name", "pasted", env={"PATH": path}).stdout.decode()
    command = text.partition("a shell:  ")[2].splitlines()[0]
    done = subprocess.run(f"{command} -- echo pasted", shell=True, capture_output=True, check=False, timeout=60)
    assert done.stdout == b"pasted\n", command


def test_up_in_json_and_a_second_machine_beside_it(up: Run, vsh: Run, vmkit: Run) -> None:
    first = json.loads(up("--json").stdout)
    second = json.loads(up("--json", "--name", "two", "--memory", "128M").stdout)
    assert (first["name"], second["name"]) == ("tiny", "two")
    assert first["cid"] != second["cid"]
    assert first["backend_reason"]
    for machine in (first, second):
        done = vsh("--vm_name", machine["name"], "--", "cat", "/proc/sys/kernel/hostname")
        assert done.stdout.decode() == machine["name"] + "\n"
    total_kib = int(vsh("--vm_name", "two", "--", "cat", "/proc/meminfo").stdout.split()[1])
    assert total_kib < 128 * 1024
    listed = [entry for entry in json.loads(vmkit("list", "--json").stdout) if not is_pools(entry["name"])]
    assert {entry["name"] for entry in listed} >= {"tiny", "two"}
    assert all(entry["state"] == "ready" for entry in listed)
    assert vmkit("down", "tiny", "two").returncode == 0


def test_machine_from_python(built: None, folders: Path) -> None:
    with vmkit_package.Machine("tiny", accelerator="tcg", name="api") as machine:
        result = machine.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert (result.stdout, result.stderr, result.exit) == (b"out\n", b"err\n", 3)
        assert machine.run(["cat"], input=b"\0\xff bytes").stdout == b"\0\xff bytes"
        assert machine.run(["pwd"], cwd="/etc").stdout == b"/etc\n"
        assert machine.run(["id", "-un"], user="user").stdout == b"user\n"
        assert machine.run(["sh", "-c", "echo $A"], env={"A": "b c"}).stdout == b"b c\n"
    assert find_machine(name="api") is None
    assert not (folders / "runtime" / "machines" / "api").exists()


def test_stdin_of_every_kind_reaches_the_guest_and_ends(ready: str, vsh: Run, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    file = tmp_path / "data"
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest().encode()
    piped = vsh("--vm_name", ready, "--", "sha256sum", stdin=data)
    assert piped.stdout.split()[0] == digest
    with file.open("rb") as stdin:
        words = [str(BIN / "vsh"), "--vm_name", ready, "--", "cat"]
        from_file = subprocess.run(words, stdin=stdin, capture_output=True, timeout=60, check=True)
    assert from_file.stdout == data
    nothing = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
    assert nothing.stdout == b""


def test_guest_has_what_was_asked_for_and_nothing_else(ready: str, vsh: Run) -> None:
    modules = vsh("--vm_name", ready, "--", "cat", "/proc/modules").stdout.decode()
    assert "vmw_vsock_virtio_transport" in modules
    assert "vsock_loopback" not in modules
    assert vsh("--vm_name", ready, "--", "nproc").stdout == b"1\n"
    links = vsh("--vm_name", ready, "--", "ls", "/sys/class/net").stdout.split()
    assert links == [b"lo"]
    assert vsh("--vm_name", ready, "--", "sh", "-c", "ls /sys/block | wc -l").stdout == b"0\n"
    # The kernel has 0 for both.
    protected = [f"/proc/sys/fs/protected_{kind}" for kind in ("fifos", "regular")]
    assert vsh("--vm_name", ready, "--", "cat", *protected).stdout == b"1\n1\n"
    # Without /etc/host.conf the resolver stops at the first line of /etc/hosts.
    program = "import _socket; print(*sorted({row[4][0] for row in _socket.getaddrinfo('localhost', 80)}))"
    assert vsh("--vm_name", ready, "--", "python3", "-I", "-S", "-c", program).stdout == b"127.0.0.1 ::1\n"


class Terminal:
    """A real vsh in a real pty, driven as a person would."""

    def __init__(self, *words: str, rows: int = 24, cols: int = 80) -> None:
        self.fd, theirs = pty.openpty()
        self.resize(rows, cols)
        self.process = subprocess.Popen(
            [str(BIN / "vsh"), *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (no threads here)
        )  # fmt: skip
        os.close(theirs)
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def expect(self, what: bytes, deadline_s: float = 30.0) -> None:
        """Reads until `what` has come; what came before it is gone then."""
        end_s = time.monotonic() + deadline_s
        while what not in self.seen:
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"{what!r} did not come, but {self.seen!r}"
            if select.select([self.fd], [], [], left_s)[0]:
                self.seen += os.read(self.fd, 65536)
        self.seen = self.seen.partition(what)[2]

    def close(self) -> int:
        status = self.process.wait(30)
        os.close(self.fd)
        return status


def test_interactive_shell_has_a_terminal_that_resizes_and_interrupts(ready: str) -> None:
    terminal = Terminal("--vm_name", ready, rows=31, cols=97)
    terminal.expect(b"# ")
    terminal.type(b"stty size\n")
    terminal.expect(b"31 97")
    terminal.resize(40, 120)
    terminal.type(b"stty size\n")
    terminal.expect(b"40 120")
    # Ctrl-C is for the program, and not for the shell that starts it.
    terminal.type(b"sh -c 'echo it ru''ns; exec sleep 100'\n")
    terminal.expect(b"it runs")
    terminal.type(b"\x03")
    terminal.expect(b"# ")
    terminal.type(b"echo status $?\n")
    terminal.expect(b"status 130")
    terminal.type(b"exit 5\n")
    assert terminal.close() == 5


def test_vi_edits_a_file_in_the_guest(ready: str, vsh: Run) -> None:
    terminal = Terminal("--vm_name", ready)
    terminal.expect(b"# ")
    terminal.type(b"vi /tmp/poem\n")
    terminal.expect(b"1/1 100%")
    terminal.type(b"ia line from vi")
    terminal.expect(b"a line from vi")
    terminal.type(b"\x1b")
    terminal.expect(b"- /tmp/poem [Modified]")
    terminal.type(b":wq\r")
    terminal.expect(b"# ")
    terminal.type(b"exit\n")
    assert terminal.close() == 0
    assert vsh("--vm_name", ready, "--", "cat", "/tmp/poem").stdout == b"a line from vi\n"


def test_many_sessions_at_once(ready: str) -> None:
    words = [str(BIN / "vsh"), "--vm_name", ready, "--", "sh", "-c", "read x; echo got $x"]
    processes = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(20)]
    for number, process in enumerate(processes):
        output, _ = process.communicate(f"{number}\n".encode(), timeout=120)
        assert output == f"got {number}\n".encode()
        assert process.returncode == 0


def test_memory_of_daemon_and_of_host_processes_is_told(ready: str, vsh: Run) -> None:
    """Printed by tests/bench/first_light.py with medians; here only the ceilings that the issue sets."""
    script = "for p in $(grep -l vshd.pid1.init /proc/[0-9]*/cmdline); do grep VmRSS ${p%cmdline}status; done"
    sizes = [int(line.split()[1]) for line in vsh("--vm_name", ready, "--", "sh", "-c", script).stdout.splitlines()]
    # pid 1, the daemon it forked, and this very session's process; the daemon's own ceiling is the issue's.
    assert len(sizes) >= 2
    assert min(sizes) <= 14 * 1024
    machine = next(machine for machine in read_machines() if machine.name == ready)
    events = [json.loads(line) for line in (Path(machine.directory) / "events.jsonl").read_text().splitlines()]
    device = next(event["pid"] for event in events if event["event"] == "device-started")

    def resident_kib(pid: int) -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    assert resident_kib(machine.pid) + resident_kib(device) <= 60 * 1024
