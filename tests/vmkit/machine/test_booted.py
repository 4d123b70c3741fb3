"""How far a guest's systemd has booted: a script stands for systemctl, behind a vshd."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vsh.live import Vshd
from vmkit.errors import MachineError
from vmkit.machine.booted import Ask, BootState, await_boot, look
from vsh.address import Address
from vsh.client import Client

# Longer than any step of a test takes.
LONG_S = 60.0


@pytest.fixture
def vshd(tmp_path: Path) -> Iterator[Vshd]:
    """Its commands are found in the folder `bin` first."""
    (tmp_path / "bin").mkdir()
    server = Vshd(tmp_path, ["--inherit_env"], env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def ask(tmp_path: Path, vshd: Vshd) -> Callable[[str], Ask]:
    """ask(script) gives a way to ask the systemctl that the script is."""

    def make(script: str) -> Ask:
        systemctl = tmp_path / "bin/systemctl"
        systemctl.write_text(f"#!/bin/sh\ncd '{tmp_path}' || exit\n{script}\n")
        systemctl.chmod(0o755)

        def run(words: list[str], timeout_s: float) -> list[str]:
            client = Client(Address.unix(str(vshd.path)), timeout_s=LONG_S)
            return client.run(["systemctl", *words], text=True, timeout=timeout_s).stdout.splitlines()

        return run

    return make


def test_boot_that_went_well(ask: Callable[[str], Ask]) -> None:
    state = await_boot("m", ask('test "$*" = "is-system-running --wait" && echo running'), LONG_S)
    assert (state, state.is_good, state.render()) == (BootState("running"), True, "running")


def test_systemd_that_cannot_be_asked_yet_is_asked_again(ask: Callable[[str], Ask], tmp_path: Path) -> None:
    script = "echo x >>tries; [ $(wc -l <tries) -gt 2 ] && echo running || { echo offline; exit 1; }"
    assert await_boot("m", ask(script), LONG_S) == BootState("running")
    assert (tmp_path / "tries").read_text() == "x\nx\nx\n"


def test_failed_units_are_named_and_made_fit_for_a_terminal(ask: Callable[[str], Ask]) -> None:
    script = r"""
case $1 in
is-system-running) echo degraded; exit 1 ;;
list-units) printf 'a.service loaded failed failed An A\nb\033[31m.mount loaded failed failed\n\n' ;;
esac"""
    state = await_boot("m", ask(script), LONG_S)
    assert (state.state, state.is_good) == ("degraded", False)
    assert state.failed[0] == "a.service"
    assert len(state.failed) == 2
    assert state.render().startswith("degraded, failed units: a.service, b")
    assert state.render().isprintable()


def test_boot_that_takes_too_long_says_what_systemd_does(ask: Callable[[str], Ask]) -> None:
    with pytest.raises(MachineError, match=r"'m' has not booted after 0\.5 s: systemd is starting") as caught:
        await_boot("m", ask("sleep 60"), 0.5)
    assert "systemctl list-jobs" in caught.value.hint


def test_look_does_not_wait(ask: Callable[[str], Ask]) -> None:
    assert look(ask('test "$*" = is-system-running && echo starting'), LONG_S) == BootState("starting")
    assert look(ask("echo offline"), LONG_S) == BootState("")
    assert look(ask("exit 1"), LONG_S) == BootState("")


def test_many_failed_units_are_counted(ask: Callable[[str], Ask]) -> None:
    """A guest can print as many as it likes, and names as long."""
    script = r"""
case $1 in
is-system-running) echo degraded; exit 1 ;;
list-units) i=0; while [ $i -lt 50 ]; do echo "unit-$i.service loaded"; i=$((i + 1)); done; printf %0999d 0 ;;
esac"""
    state = await_boot("m", ask(script), LONG_S)
    assert state.failed[-1] == "0" * 255
    assert state.render().endswith("unit-18.service, unit-19.service and 31 more")
