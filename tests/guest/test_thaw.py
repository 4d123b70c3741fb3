"""A guest that is frozen and thawed where it runs: what a thaw changes in a real kernel, and what it leaves."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmkit
from tests.guest.clock import CLOCK_LIMIT_S, read_clock_error_s
from tests.vsh.live import wait_until
from vsh.address import Address, address_of
from vsh.errors import ExecError, VshError
from vsh.freezing import freeze, make_thaw, thaw
from vshd.wire import messages
from vshd.wire.proof import render_token

SECRET = bytes(range(32))
TOKEN = bytes(reversed(range(32)))
TIMEOUT_S = 60.0
FACTS = """
cat /proc/sys/kernel/random/boot_id; uname -n; cat /etc/hostname; grep 127.0.1.1 /etc/hosts; cat /etc/machine-id
"""


@pytest.fixture
def machine(built: None, folders: Path) -> Iterator[vmkit.Machine]:
    with vmkit.Machine("tiny", accelerator="tcg", backend="user", name="cold") as machine:
        yield machine


def with_secret(machine: vmkit.Machine, folder: Path, secret: bytes) -> Address:
    address = address_of(machine.find_entry())
    path = folder / secret[:4].hex()
    path.write_bytes(render_token(secret))
    path.chmod(0o600)
    address.token_file = str(path)
    return address


def ask(address: Address, script: str) -> str:
    return vmkit.Client(address).run(["sh", "-c", script], text=True).stdout


def test_thaw_makes_another_machine_of_the_guest(machine: vmkit.Machine, tmp_path: Path) -> None:
    open_address = address_of(machine.find_entry())
    assert ask(open_address, "uname -n; cat /etc/hostname") == "cold\ncold\n"
    ask(open_address, "echo 0123456789abcdef0123456789abcdef > /etc/machine-id; date -s '2001-01-01 00:00'")
    before = ask(open_address, FACTS).split("\n")
    freeze(open_address, SECRET, timeout_s=TIMEOUT_S)
    with pytest.raises(VshError, match="demands its token"):
        ask(open_address, "true")
    address = with_secret(machine, tmp_path, SECRET)
    with pytest.raises(ExecError) as caught:
        ask(address, "true")
    assert caught.value.kind == messages.FROZEN

    request = make_thaw("warm", TOKEN)
    thawed = thaw(address, request, timeout_s=TIMEOUT_S)
    assert thawed.clock_error_ns < 50_000_000
    assert "WALL_KERNEL=on" in thawed.wall

    for stranger in (open_address, address):
        with pytest.raises(VshError, match=r"token|prove"):
            ask(stranger, "true")
    address = with_secret(machine, tmp_path, TOKEN)
    after = ask(address, FACTS).split("\n")
    assert after[0] == request.boot_id.decode() != before[0]
    assert after[1:3] == ["warm", "warm"]
    assert after[3:5] == ["127.0.1.1 warm", request.machine_id.decode()]
    assert read_clock_error_s(vmkit.Client(address)) < CLOCK_LIMIT_S
    with pytest.raises(ExecError, match="not frozen"):
        thaw(address, make_thaw("again"), timeout_s=TIMEOUT_S)


def test_vshd_that_dies_in_a_thawed_guest_comes_back_with_the_new_token(machine: vmkit.Machine, tmp_path: Path) -> None:
    """The firmware and the saved memory hold other tokens, and pid 1 starts a vshd that has seen no thaw."""
    open_address = address_of(machine.find_entry())
    freeze(open_address, SECRET, timeout_s=TIMEOUT_S)
    thaw(with_secret(machine, tmp_path, SECRET), make_thaw("warm", TOKEN), timeout_s=TIMEOUT_S)
    address = with_secret(machine, tmp_path, TOKEN)
    ask(address, "kill -9 $(cat /proc/$PPID/stat | cut -d' ' -f4)")

    def is_back() -> bool:
        try:
            return ask(address, "echo hi") == "hi\n"
        except VshError:
            return False

    wait_until(is_back, "vshd serves again")
    for stranger in (open_address, with_secret(machine, tmp_path, SECRET)):
        with pytest.raises(VshError, match=r"token|prove"):
            ask(stranger, "true")


def test_random_numbers_take_what_the_host_sends(machine: vmkit.Machine, tmp_path: Path) -> None:
    """The kernel accepts the entropy, and says so: it counts it, or a thaw fails."""
    freeze(address_of(machine.find_entry()), SECRET, timeout_s=TIMEOUT_S)
    request = make_thaw("warm")
    request.entropy = os.urandom(512)
    thaw(with_secret(machine, tmp_path, SECRET), request, timeout_s=TIMEOUT_S)
    assert ask(address_of(machine.find_entry()), "uname -n") == "warm\n"
