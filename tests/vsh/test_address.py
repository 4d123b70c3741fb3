"""Where a vshd is: the registry, CIDs, and messages that say whose fault it is."""

import os
from pathlib import Path

import pytest

from tests.vsh.conftest import Register
from vsh import address
from vsh.address import Address
from vsh.errors import VshError
from vsh.transport import open_transport


def test_cid_of_a_machine_is_its_socket(registry: Register) -> None:
    registry("tiny", 3, vsock="/run/tiny.sock")
    found = address.find_by_cid(3)
    assert (found.kind, found.path, found.port, found.is_ours) == ("hybrid", "/run/tiny.sock", 9001, True)
    assert address.find_by_name("tiny").path == "/run/tiny.sock"
    assert address.find_only().path == "/run/tiny.sock"


def test_machine_of_the_kernels_vsock(registry: Register) -> None:
    registry("fast", 5, vsock=None)
    found = address.find_by_cid(5)
    assert (found.kind, found.cid, found.is_ours) == ("vsock", 5, True)


def test_cid_outside_the_registry_is_the_kernels(registry: Register) -> None:
    found = address.find_by_cid(77)
    assert (found.kind, found.cid, found.is_ours) == ("vsock", 77, False)


@pytest.mark.parametrize("cid", [0, 1, 2, 2**32 - 1])
def test_cids_that_are_no_guests_are_refused(registry: Register, cid: int) -> None:
    with pytest.raises(VshError, match="the CID of a guest must be between 3 and"):
        address.find_by_cid(cid)
    with pytest.raises(VshError, match="the CID of a guest must be between 3 and"):
        Address.vsock(cid)


def test_cid_that_is_too_large(registry: Register) -> None:
    with pytest.raises(VshError, match=r"Cid value \(4294967296\) is too large"):
        address.find_by_cid(2**32)


def test_kernels_vsock_is_denied_here() -> None:
    with pytest.raises(VshError, match="VSH_AF_VSOCK=deny"):
        open_transport(Address.vsock(77), 1e12)


def test_unknown_name_lists_the_known(registry: Register) -> None:
    registry("one", 3)
    registry("two", 4)
    # One that is saved in the background is for no person.
    registry("saving-12345678", 5)
    with pytest.raises(VshError, match="no machine named 'three' is running") as caught:
        address.find_by_name("three")
    assert caught.value.hint == "running: one (--cid 3), two (--cid 4); choose one with --vm_name or --cid"


def test_nothing_runs(registry: Register) -> None:
    with pytest.raises(VshError, match="no machine is running") as caught:
        address.find_only()
    assert "vmkit up" in caught.value.hint


def test_a_choice_is_the_users(registry: Register) -> None:
    registry("one", 3)
    registry("two", 4)
    with pytest.raises(VshError, match="several machines are running") as caught:
        address.find_only()
    assert "one (--cid 3)" in caught.value.hint


def test_machine_that_waits_in_a_pool_is_no_choice(registry: Register) -> None:
    registry("p-1", 3, state="pooled")
    with pytest.raises(VshError, match="it is pooled"):
        address.find_only()
    registry("one", 4)
    assert address.find_only().name == "machine 'one'"


def test_stale_entry_is_no_machine(registry: Register) -> None:
    registry("dead", 3, alive=False)
    registry("alive", 4)
    assert address.find_only().name == "machine 'alive'"
    assert address.find_by_cid(3).kind == "vsock"


@pytest.mark.parametrize("state", ["starting", "stopping"])
def test_machine_that_is_not_ready(registry: Register, state: str) -> None:
    registry("tiny", 3, state=state)
    with pytest.raises(VshError, match=f"machine 'tiny' is not ready: it is {state}") as caught:
        address.find_by_cid(3)
    assert caught.value.hint == "vmkit status tiny"


@pytest.mark.usefixtures("registry")
def test_runtime_directory_open_to_others_is_refused(runtime: Path) -> None:
    runtime.chmod(0o755)
    with pytest.raises(VshError, match="other users have access"):
        address.find_only()


@pytest.mark.usefixtures("registry")
@pytest.mark.root
def test_runtime_directory_of_somebody_else_is_refused(runtime: Path) -> None:
    os.chown(runtime, 65534, 65534)
    with pytest.raises(VshError, match="belongs to uid 65534"):
        address.find_only()
