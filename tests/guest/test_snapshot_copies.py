"""Many machines of one snapshot: 50 one after another, 8 at once, and 20 together, of which no two are equal."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vmkit as vmkit_package
from tests.guest.clock import CLOCK_LIMIT_S, read_clock_error_s
from tests.guest.conftest import Run
from vmkit.machine.restore import open_store
from vmkit.snapshots.store import SECRET
from vsh.address import address_of
from vsh.errors import VshError

pytestmark = pytest.mark.slow

NAME = "of-the-copies"
IN_A_ROW, AT_ONCE, DIFFERENT = 50, 8, 20
# tiny has no machine-id; a thaw changes the one of an image that has it.
MACHINE_ID = "0123456789abcdef0123456789abcdef"
IDENTITY = """
od -An -tx8 -N16 /dev/urandom | tr -d ' '
cat /proc/sys/kernel/random/uuid /etc/machine-id /proc/sys/kernel/random/boot_id
uname -n
"""
WALL = {"transport": "on", "daemon": "on", "kernel": "on"}


@pytest.fixture(scope="module")
def saved(built: None, vmkit: Run) -> Iterator[None]:
    # Left by a run that was interrupted.
    vmkit("snapshot", "rm", NAME)
    words = ("--run", f"echo {MACHINE_ID} > /etc/machine-id", "--accel", "tcg", "--backend", "user", "--memory", "128M")
    done = vmkit("snapshot", "save", NAME, *words)
    assert done.returncode == 0, done.stderr.decode()
    yield
    assert vmkit("snapshot", "rm", NAME).returncode == 0


def make_copy(number: int) -> vmkit_package.Machine:
    return vmkit_package.Machine(
        "tiny", name=f"copy-{number}", snapshot=NAME, accelerator="tcg", backend="user", token=True
    )


def live_once(number: int) -> str:
    with make_copy(number) as machine:
        assert machine.started.started_by == "snapshot"
        return machine.run(["uname", "-n"], text=True, check=True).stdout.strip()


def test_restores_in_a_row_all_succeed(saved: None) -> None:
    assert [live_once(number) for number in range(IN_A_ROW)] == [f"copy-{number}" for number in range(IN_A_ROW)]


def test_restores_at_once_all_succeed(saved: None) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = list(pool.map(live_once, range(AT_ONCE)))
    assert names == [f"copy-{number}" for number in range(AT_ONCE)]


def test_copies_are_machines_of_their_own(saved: None) -> None:
    """The first command of each prints what would be equal in two guests of the same memory."""
    with contextlib.ExitStack() as stack:
        machines = [stack.enter_context(make_copy(number)) for number in range(DIFFERENT)]
        seen = [machine.run(["sh", "-c", IDENTITY], text=True, check=True).stdout.split() for machine in machines]
        for kind, values in zip(
            ("urandom", "uuid", "machine-id", "boot_id", "hostname"), zip(*seen, strict=True), strict=True
        ):
            assert len(set(values)) == DIFFERENT, (kind, values)
            assert MACHINE_ID not in values
        assert [words[-1] for words in seen] == [machine.name for machine in machines]
        assert len({machine.cid for machine in machines}) == DIFFERENT
        assert len({(machine.directory / "token").read_bytes() for machine in machines}) == DIFFERENT
        secret = str(open_store().find_named(NAME) / SECRET)
        for machine, other in zip(machines, machines[1:] + machines[:1], strict=True):
            assert read_clock_error_s(machine.connect()) < CLOCK_LIMIT_S
            assert machine.find_entry().record["wall"] == WALL
            for token_file in (str(Path(other.directory) / "token"), secret):
                address = address_of(machine.find_entry())
                address.token_file = token_file
                with pytest.raises(VshError, match="did not prove"):
                    vmkit_package.Client(address).run(["true"])
