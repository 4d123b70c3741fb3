"""The ladder to a real machine: own directories -> built image -> booted -> ready; what fails leaves its evidence.

Every machine of a test is killed at its end. When a test fails, the console, the QMP log, the argv and the other logs
of every machine it had are copied to test-evidence/TEST/ first, those of the machines in the host VM included.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import pytest

from tests.guest.nested import CID, MEMORY, NAME, NestedHost, write_recipe
from vmkit.machine import stop
from vmkit.machine.machine import Machine
from vmkit.machine.running import LOG_KINDS
from vmkit.pool.pool import PooledMachine, RunningPool
from vmkit.pool.registry import read_pools
from vsh.errors import VshError
from vsh.registry import read_machines

EVIDENCE = Path(__file__).parents[2] / "test-evidence"
BIN = Path(sys.executable).parent
# Boots under TCG on two busy cores take 5 to 15 s; a test that waits this long has hung.
DEADLINE_S = 180


def pytest_configure(config: pytest.Config) -> None:
    # Tests share the machines of their modules: one that waits for the next module is enough.
    config.option.vm_pool = config.option.vm_pool or 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests for `-m vm`, and gives the plugin's fixtures the machine that they start from."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
    for module in {item.getparent(pytest.Module) for item in items if item.get_closest_marker("vm")}:
        if module is not None:
            # Memory that no other test asks for: the pool's snapshot is of no other machine.
            module.add_marker(pytest.mark.vm(accelerator="tcg", backend="user", memory="257M"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when != "teardown" and report.failed:
        folder = find_evidence(item)
        sources = {"the machines": save_evidence}
        host = getattr(item, "funcargs", {}).get("nested_host")
        if host is not None:
            sources["the host VM"] = host.save_evidence
        for title, save in sources.items():
            try:
                save(folder)
            except (VshError, OSError, tarfile.TarError) as error:
                report.sections.append((f"evidence of {title}", f"could not be had: {error}"))
    return report


def find_evidence(item: pytest.Item) -> Path:
    """The folder for what a failed test leaves."""
    return EVIDENCE / re.sub(r"[^A-Za-z0-9_.-]+", "_", item.name)


def save_evidence(folder: Path) -> None:
    """Copies the logs of the running machines and of those that ended badly."""
    sources = {machine.name: Path(machine.directory) for machine in read_machines()}
    state = Path(os.environ.get("VMKIT_STATE_DIR", "/nonexistent"))
    if state.is_dir():
        sources |= {f"{path.name}.ended": path for path in state.iterdir()}
    for label, source in sources.items():
        target = folder / label
        target.mkdir(parents=True, exist_ok=True)
        for log in LOG_KINDS.values():
            if (source / log).exists():
                shutil.copyfile(source / log, target / log)


@pytest.fixture(scope="session")
def folders() -> Iterator[Path]:
    """Folders of this run, snapshots too, so that a machine boots unless its test made a snapshot.

    The image cache is the user's: it is only ever added to.
    """
    root = Path(tempfile.mkdtemp(prefix="vmkit-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("runtime", "state", "data", "snapshots"):
            (root / name).mkdir(mode=0o700)
            patch.setenv(f"VMKIT_{name.upper()}_DIR", str(root / name))
        yield root
        for pool in read_pools():
            RunningPool(pool).stop()
        for machine in read_machines():
            stop.kill(machine)
    shutil.rmtree(root)


class RunOptions(TypedDict, total=False):
    """The keywords of run_program()."""

    stdin: bytes
    timeout_s: float
    env: dict[str, str] | None


class Run(Protocol):
    """The fixtures vmkit and vsh."""

    def __call__(self, *words: str, **options: Unpack[RunOptions]) -> "subprocess.CompletedProcess[bytes]": ...


def run_program(
    program: str, *words: str, stdin: bytes = b"", timeout_s: float = DEADLINE_S, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [str(BIN / program), *words],
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})},
    )


@pytest.fixture(scope="session")
def vmkit(folders: Path) -> Run:
    """vmkit("up", ...) runs the real program."""

    def run(*words: str, **options: Unpack[RunOptions]) -> "subprocess.CompletedProcess[bytes]":
        return run_program("vmkit", *words, **options)

    return run


@pytest.fixture(scope="session")
def vsh(folders: Path) -> Run:
    """vsh("--cid", "3", "--", ...) runs the real program."""

    def run(*words: str, **options: Unpack[RunOptions]) -> "subprocess.CompletedProcess[bytes]":
        return run_program("vsh", *words, **options)

    return run


@pytest.fixture(scope="session")
def built(vmkit: Run) -> None:
    done = vmkit("build", "tiny")
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def up(built: None, vmkit: Run) -> Iterator[Run]:
    """up(...) runs `vmkit up`; whatever runs at the end of the test is killed."""

    def start(*words: str, **options: Unpack[RunOptions]) -> "subprocess.CompletedProcess[bytes]":
        return vmkit("up", "--accel", "tcg", *words, **options)

    known = {machine.name for machine in read_machines()}
    yield start
    for machine in read_machines():
        if machine.name not in known and not is_pools(machine.name):
            stop.kill(machine)


def is_pools(name: str) -> bool:
    """Whether a machine is of the plugin's pool."""
    return name.startswith("test-")


@pytest.fixture
def own_registry(built: None, folders: Path, vmkit: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of the test's own, for what starts with CID 3, or leaves out the name of the only machine.

    Snapshots of its own, too: what a page or an example makes is no other test's.
    """
    runtime = folders / "own"
    runtime.mkdir(mode=0o700, exist_ok=True)
    snapshots = folders / "own snapshots"
    snapshots.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("VMKIT_SNAPSHOTS_DIR", str(snapshots))
    # To prove a broken KVM takes ten seconds.
    for verdict in (folders / "runtime").glob("kvm-*.json"):
        shutil.copy(verdict, runtime)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    yield
    vmkit("forward", "--remove", "all")
    for machine in read_machines():
        stop.kill(machine)
    shutil.rmtree(snapshots)


@pytest.fixture(scope="session")
def nested_host(folders: Path) -> Iterator[NestedHost]:
    """A Linux host of our own with /dev/vhost-vsock and AF_VSOCK, and tiny built in it; for the whole run."""
    image = str(write_recipe(folders))
    with Machine(image, name=NAME, cid=CID, memory=MEMORY, accelerator="tcg", backend="user") as machine:
        yield NestedHost(machine)


@pytest.fixture(scope="module")
def ready(built: None, vm_module: PooledMachine) -> str:
    """The name of one ready machine, shared by the tests of a module that do it no harm. It comes from a pool."""
    return vm_module.name
