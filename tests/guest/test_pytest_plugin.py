"""The pytest plugin with real machines: whole runs of pytest, what they print, and what they leave."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.docs.pages import CHECKOUT
from tests.guest.conftest import BIN, Run
from tests.vsh.live import wait_until
from vmkit.forward.registry import read_kept
from vmkit.pool.registry import read_pools
from vsh.registry import read_machines

DEADLINE_S = 300.0
PAGE = CHECKOUT / "docs/howto/pytest.md"
pytestmark = pytest.mark.usefixtures("own_registry")
MARK = """
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user")
"""
FRESH = f"""{MARK}
@pytest.mark.parametrize("number", range(4))
def test_fresh(vm, number):
    assert vm.run(["sh", "-c", "test ! -e /tmp/x && touch /tmp/x"]).exit == 0
"""
FAILING = """
import subprocess
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user")

def test_first(vm): vm.run(["true"], check=True)

def test_panic(vm):
    # Its start has been reported before the panic, which would otherwise be the failure of popen.
    process = vm.popen(["sh", "-c", "read go; echo c > /proc/sysrq-trigger"], stdin=subprocess.PIPE)
    process.stdin.write(b"go\\n")
    process.stdin.flush()
    vm.wait(60)

def test_fails(vm):
    vm.run(["sh", "-c", "echo seen on the console > /dev/console"])
    assert vm.name == "another"

def test_last(vm): vm.run(["true"], check=True)
"""
SHARED = """
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user", files={"/root/a/b": b"c"})

def test_one(vm_module): vm_module.run(["touch", "/tmp/x"], check=True)
def test_two(vm_module): assert vm_module.exists("/tmp/x")
def test_file(vm_module): assert vm_module.run(["cat", "/root/a/b"]).stdout == b"c"

def test_several(vm_factory):
    names = {vm_factory().name, vm_factory(append="loglevel=3").name}
    assert len(names) == 2
"""
FORKING = """
import os
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user")

def test_forks(vm):
    child = os.fork()
    if child == 0:
        raise SystemExit
    os.waitpid(child, 0)
    vm.run(["true"], check=True)
"""
SHUT = """
import os, pathlib
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user")

def test_changes_what_the_plugin_reads(vm):
    pathlib.Path(os.environ["VMKIT_RUNTIME_DIR"]).chmod(0o755)
"""
HANGING = """
import pytest
pytestmark = pytest.mark.vm(memory="128M", accelerator="tcg", backend="user")

@pytest.mark.parametrize("number", range(4))
def test_hangs(vm, number): vm.run(["sleep", "600"])
"""


@pytest.fixture(scope="module")
def snapshots(built: None, folders: Path, vmkit: Run) -> Path:
    """A folder with the snapshot that most runs here start their machines from; the first test makes its own."""
    folder = folders / "plugin snapshots"
    folder.mkdir(mode=0o700)
    words = ("--memory", "128M", "--accel", "tcg", "--backend", "user")
    done = vmkit("snapshot", "make", "tiny", *words, env={"VMKIT_SNAPSHOTS_DIR": str(folder)})
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture
def made(own_registry: None, snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a run that need not make that snapshot itself."""
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(snapshots))
    return snapshots


@pytest.fixture(autouse=True)
def nothing_is_left(own_registry: None) -> Iterator[None]:
    yield
    assert read_pools() == []
    assert read_machines() == []


def start(folder: Path, text: str, *words: str) -> "subprocess.Popen[str]":
    (folder / "test_it.py").write_text(text)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: "subprocess.Popen[str]") -> str:
    with run:
        return run.communicate(timeout=DEADLINE_S)[0]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_each_test_has_a_fresh_machine(tmp_path: Path, workers: list[str]) -> None:
    shown = finish(start(tmp_path, FRESH, *workers))
    assert "4 passed" in shown, shown


@pytest.mark.usefixtures("made")
def test_pool_that_was_ended_is_made_anew(tmp_path: Path) -> None:
    ended = FRESH + "\n    import vmkit\n    number or vmkit.find_pool().stop()\n"
    shown = finish(start(tmp_path, ended))
    assert "4 passed" in shown, shown


@pytest.mark.usefixtures("made")
def test_fixtures_of_larger_scopes_and_the_factory(tmp_path: Path) -> None:
    shown = finish(start(tmp_path, SHARED, "-W", "error"))
    assert "4 passed" in shown, shown


@pytest.mark.usefixtures("made")
def test_programs_of_the_page_pass_and_their_forward_ends_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    text = MARK
    for heading in ("## Check what a command did", "## Reach a server in the machine"):
        text += PAGE.read_text().partition(heading)[2].partition("```python")[2].partition("```")[0]
    shown = finish(start(tmp_path, text, "-W", "error"))
    assert "2 passed" in shown, shown
    assert read_kept() == []


@pytest.mark.usefixtures("made")
def test_file_that_a_marker_names_and_nobody_has_is_one_line(tmp_path: Path) -> None:
    shown = finish(start(tmp_path, MARK.replace(")", ", files={'/a': 'no-such-file'})") + "def test(vm): pass\n"))
    assert f"vm: vmkit: files of the marker vm: there is no {tmp_path}/no-such-file" in shown
    assert "plugin.py" not in shown


@pytest.mark.usefixtures("made")
def test_child_of_a_test_does_not_end_its_machine(tmp_path: Path) -> None:
    # The child prints its own summary before.
    shown = finish(start(tmp_path, FORKING, "-W", "error"))
    assert shown.rstrip().splitlines()[-1].startswith("1 passed"), shown


@pytest.mark.usefixtures("made")
def test_runtime_directory_that_a_test_opens_is_no_error_of_the_plugin(tmp_path: Path, folders: Path) -> None:
    shown = finish(start(tmp_path, SHUT))
    (folders / "own").chmod(0o700)
    assert shown.rstrip().splitlines()[-1].startswith("1 passed"), shown
    wait_until(lambda: not read_machines() and not read_pools(), "the pool has ended with its run", DEADLINE_S)


@pytest.mark.usefixtures("made")
def test_failure_shows_the_guest_and_costs_one_test(tmp_path: Path) -> None:
    shown = finish(start(tmp_path, FAILING, "--junitxml=junit.xml"))
    assert "2 failed, 2 passed" in shown, shown
    assert re.search(r"the machine 'test-\S+' has ended: .*panic", shown), shown
    cases = {case.attrib["name"]: case for case in Xml.parse(tmp_path / "junit.xml").iter("testcase")}
    panic, fails = (cases[name].find("failure") for name in ("test_panic", "test_fails"))
    assert panic is not None
    assert "Kernel panic - not syncing: sysrq triggered crash" in (panic.text or "")
    assert fails is not None
    assert "seen on the console" in (fails.text or "")
    assert "events of test-" in (fails.text or "")
    packets = (fails.text or "").partition("last packets of test-")[2]
    assert re.search(r"^\S+ to-guest rw .* > \d+:9001 ", packets, re.MULTILINE), fails.text


@pytest.mark.usefixtures("made")
def test_machine_of_a_failed_test_is_kept_on_request(tmp_path: Path, vmkit: Run, vsh: Run) -> None:
    shown = finish(start(tmp_path, FAILING, "-k", "fails", "--vm-keep-on-failure"))
    found = re.search(r"^(\S+): vsh --cid (\d+)$", shown, re.MULTILINE)
    assert found is not None, shown
    assert [machine.name for machine in read_machines()] == [found[1]]
    assert vsh("--cid", found[2], "--", "echo", "hi").stdout == b"hi\n"
    assert vmkit("kill", found[1]).returncode == 0


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, []), (signal.SIGKILL, []), (signal.SIGKILL, ["-n", "2"])]
)
def test_run_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals, workers: list[str]) -> None:
    run = start(tmp_path, HANGING, *workers)
    wanted = 2 if workers else 1
    wait_until(lambda: sum(one.state == "ready" for one in read_machines()) == wanted, "the tests run", DEADLINE_S)
    os.kill(run.pid, number)
    run.wait(DEADLINE_S)
    wait_until(lambda: not read_machines() and not read_pools(), "all machines have ended", DEADLINE_S)
    finish(run)
