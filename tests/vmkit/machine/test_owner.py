"""How long a machine lives when the process that started it is killed: one of a with-block ends, others do not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.machine.test_start import entries, is_alive, until
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.registry import find_state_directory
from vmkit.machine.words import Watch
from vsh.registry import find_machine, read_machines

HEAD = """
import functools, os, sys, time
from pathlib import Path
import vmkit
from vmkit.image.build import BuiltImage
from vmkit.machine import machine as room
kernel = Path(sys.argv[1])
image = BuiltImage("tiny", kernel, kernel, kernel, (), "root", "0" * 64, True)
room.start_machine = functools.partial(room.start_machine, build=lambda i, t: image)
machine = vmkit.Machine("tiny", accelerator="tcg", backend="user", append="fake=ready")
"""
BLOCK = "with machine:\n    print('ready', flush=True)\n    time.sleep(1000)\n"
# A child without exec has every descriptor of its parent, as multiprocessing's workers do.
FORKED = """
with machine:
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(1000)
"""
# The child leaves the block as its program ends; the machine is not its own.
CHILD_LEAVES = """
with machine:
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print('child left', flush=True)
    time.sleep(1000)
"""
STARTED = "machine.start()\nprint('ready', flush=True)\ntime.sleep(1000)\n"
LEFT = "with machine:\n    print('ready', flush=True)\n    os._exit(0)\n"

Run = Callable[[str], tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def run(image: BuiltImage) -> Run:
    """run(script) starts it, and returns the process and its first line, printed when the machine was ready."""

    def start(script: str) -> tuple["subprocess.Popen[str]", str]:
        words = [sys.executable, "-c", HEAD + script, str(image.kernel)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    return start


def find_qemu_pid() -> int:
    entry = find_machine(name="tiny")
    assert entry is not None
    return int(str(entry.record["qemu_pid"]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_machine_of_a_block_ends_with_its_process(run: Run, folders: Path, number: int) -> None:
    process, _ = run(BLOCK)
    qemu = find_qemu_pid()
    process.send_signal(number)
    process.communicate(timeout=30)
    until(lambda: entries(folders) == [])
    assert not is_alive(qemu)
    kept = find_state_directory() / "tiny" / "events.jsonl"
    end = json.loads(kept.read_text().splitlines()[-1])
    assert (end["reason"], end["expected"]) == ("owner-gone", False)


def test_process_that_leaves_without_unwinding_takes_its_machine_along(run: Run, folders: Path) -> None:
    process, _ = run(LEFT)
    process.communicate(timeout=30)
    until(lambda: entries(folders) == [])


def test_child_that_outlives_the_owner_keeps_nothing_alive(run: Run, folders: Path) -> None:
    process, child = run(FORKED)
    process.kill()
    try:
        until(lambda: entries(folders) == [])
        assert is_alive(int(child))
    finally:
        os.kill(int(child), signal.SIGKILL)
        process.communicate(timeout=30)


def test_child_that_leaves_the_block_ends_nothing(run: Run, folders: Path) -> None:
    process, said = run(CHILD_LEAVES)
    assert said == "child left"
    assert is_alive(find_qemu_pid())
    process.kill()
    process.communicate(timeout=30)
    until(lambda: entries(folders) == [])


def test_machine_that_was_started_without_a_block_outlives_its_process(run: Run) -> None:
    process, _ = run(STARTED)
    process.kill()
    process.communicate(timeout=30)
    machine = find_machine(name="tiny")
    assert machine is not None
    assert machine.state == "ready"
    # Its monitor has seen that the process is gone by the time it answers.
    with stop.open_control(machine) as control:
        control.ask(Watch())
        assert control.wait_end(0.2) is None
    stop.kill(machine)
    assert read_machines() == []
