"""Hostile text in commands, users, directories and forwards, inside each image: every session leaves its audit line.

An image holds a part of Python alone. What the log needs and an image lacks is found here, and nowhere on the host.
"""

import os
from collections.abc import Iterator

import pytest

import vmkit
from tests.guest.nested import NAME
from vsh.address import Address, address_of
from vsh.client import Client
from vsh.errors import ExecError, VshError
from vsh.registry import find_machine
from vsh.session import open_raw
from vshd.wire.requests import Forward

DEADLINE_S = 60.0
TEXTS = [
    b"two\nlines\n",
    b"\r\t\x01\x1b]0;title\x07",
    b"\xff\xfe not UTF-8 \xc3",
    "\u2028\u202e\ufffe\U000e0001\u00e9".encode(),
    b"\n" * 5000,
    b"\xff" * 5000,
]


@pytest.fixture(scope="module", params=["tiny", "bench", "debian", "nested"])
def address(request: pytest.FixtureRequest) -> Iterator[Address]:
    """How to reach a machine of each image."""
    if request.param == "nested":
        request.getfixturevalue("nested_host")
        yield find_address(NAME)
        return
    request.getfixturevalue("folders")
    with vmkit.Machine(request.param, accelerator="tcg", backend="user", name=f"hostile-{request.param}") as machine:
        yield find_address(machine.name)


def find_address(name: str) -> Address:
    entry = find_machine(name=name)
    assert entry is not None
    return address_of(entry)


def read_log(client: Client) -> list[str]:
    """What vshd has logged, without the kernel's times."""
    # The dmesg of util-linux leaves the newest record out.
    client.run(["true"])
    text = client.run(["dmesg"]).stdout.decode()
    return [line.partition("vshd: ")[2] for line in text.splitlines() if "vshd: " in line]


@pytest.mark.parametrize("is_extended", [True, False], ids=["extended", "legacy"])
def test_every_session_leaves_an_audit_line(address: Address, is_extended: bool) -> None:
    client = Client(address, timeout_s=DEADLINE_S, extended=is_extended)
    # A legacy request holds 4096 bytes.
    texts = [text[:2000] for text in TEXTS]
    for index, text in enumerate(texts):
        tag = f"case-{is_extended}-{index}"
        assert client.run([b"sh", b"-c", b"exit 7", f"{tag}-word".encode(), text]).exit == 7
        # The first word is the command itself.
        assert client.run([b"sh", b"-c", f"echo {tag}-script\n'".encode() + text + b"'"]).exit in (0, 1, 127)
        with pytest.raises(VshError):
            client.run([f"{tag}-user"], user=os.fsdecode(text))
        if is_extended:
            with pytest.raises(ExecError):
                client.run([f"{tag}-directory"], cwd=os.fsdecode(text))
        else:
            assert client.run(["true", f"{tag}-directory"], cwd=os.fsdecode(text)).exit == 0
    lines = read_log(client)
    for index in range(len(texts)):
        for name in ("word", "script", "user", "directory"):
            assert len([line for line in lines if f"case-{is_extended}-{index}-{name}" in line]) == 1
    assert not [line for line in lines if "the session's process ended" in line or "Error:" in line]


def test_forward_to_a_hostile_place_is_refused_with_a_line(address: Address) -> None:
    client = Client(address, timeout_s=DEADLINE_S)
    for index, text in enumerate(TEXTS):
        for place in (b"tcp:" + text + b":80", b"unix:/forward-%d" % index + text, text):
            with pytest.raises(VshError):
                open_raw(address, Forward(connect=place), timeout_s=DEADLINE_S)
    lines = read_log(client)
    assert len([line for line in lines if "forward to" in line]) >= 3 * len(TEXTS)
    assert not [line for line in lines if "the session's process ended" in line or "Error:" in line]
