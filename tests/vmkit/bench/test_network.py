"""The ceiling of the forwards without a VM: what the host allows, and the conversation with the other process.

Programs that the host may not allow are scripts on PATH.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.machine.conftest import folders
from vmkit.bench.__main__ import choose_netdev
from vmkit.bench.network import PROBE_TIMEOUT_S, LinkKind, Network, find_network, open_network, plan_tap
from vmkit.errors import HostError
from vmkit.forward.namespace import ENTER, render_tools_environment
from vmkit.run import render_command, run

__all__ = ["folders"]

Unshare = Callable[[str], None]


@pytest.fixture
def unshare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unshare:
    """unshare("exit 0"): the program of that name does just this."""

    def make(script: str) -> None:
        path = tmp_path / "unshare"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_tap_is_had_where_a_namespace_and_a_device_are(unshare: Unshare, tmp_path: Path) -> None:
    unshare(f'echo "$@" > {tmp_path}/words')
    network = find_network()
    assert network == Network(LinkKind.TAP)
    assert "TAP" in network.render()
    # It asks for the very device that is used later.
    assert render_command(plan_tap()[0]) in (tmp_path / "words").read_text()


def test_slirp_stands_in_and_says_why(unshare: Unshare, monkeypatch: pytest.MonkeyPatch) -> None:
    unshare("echo unshare failed: Operation not permitted >&2; exit 1")
    network = find_network()
    assert network == Network(LinkKind.SLIRP, "unshare failed: Operation not permitted")
    assert network.render() == "QEMU's user-mode network (slirp): no TAP (unshare failed: Operation not permitted)"
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_network().kind is LinkKind.SLIRP


@pytest.mark.skipif(find_network().kind is not LinkKind.TAP, reason="this host has no TAP for us")
def test_taps_commands_make_the_hosts_end_of_the_network() -> None:
    script = " && ".join(map(render_command, plan_tap()))
    argv = [*ENTER, "sh", "-c", f"{script} && ip -o addr show"]
    shown = run(argv, timeout_s=PROBE_TIMEOUT_S, env=render_tools_environment()).decode()
    assert "vmkit0    inet 10.0.2.2/24" in shown


def test_netdev_leads_to_the_sink_in_the_guest() -> None:
    netdev, place = choose_netdev(LinkKind.TAP)
    assert (netdev, place) == ("tap,ifname=vmkit0,script=no,downscript=no", ("10.0.2.15", 5001))
    netdev, (host, port) = choose_netdev(LinkKind.SLIRP)
    assert netdev == f"user,restrict=on,hostfwd=tcp:{host}:{port}-10.0.2.15:5001"
    assert host == "127.0.0.1"


def test_other_process_sends_what_it_is_told_and_ends_with_its_stdin(
    unshare: Unshare, folders: Path, tmp_path: Path
) -> None:
    unshare(f'echo up; read size; echo "$size.5"; read none; echo "$*" "$VMKIT_RUNTIME_DIR" > {tmp_path}/ended')
    with open_network(Network(LinkKind.TAP), "m-net", "tcg") as carry:
        assert carry(123) == 123.5
        assert not (tmp_path / "ended").exists()
    words = (tmp_path / "ended").read_text().split()
    assert words[-6:] == ["-m", "vmkit.bench", "tap", "m-net", "tcg", str(folders / "runtime")]


@pytest.mark.parametrize(
    ("script", "brief"),
    [("echo no kernel for that", "no kernel for that"), ("exit 1", "the machine with a network has ended")],
)
def test_what_fails_there_is_told_here(unshare: Unshare, folders: Path, script: str, brief: str) -> None:
    unshare(script)
    with pytest.raises(HostError, match=brief), open_network(Network(LinkKind.TAP), "m", "tcg"):
        pytest.fail("there is no network")
    unshare(f"echo up; read size; {script}")
    with open_network(Network(LinkKind.TAP), "m", "tcg") as carry, pytest.raises(HostError, match=brief):
        carry(1)
