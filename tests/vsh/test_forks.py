"""Programs that fork beside a running command: a child without exec has a copy of every descriptor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Vshd, wait_until

HEAD = """
import os, signal, sys, time
from vsh.address import Address
from vsh.client import Client
client = Client(Address.unix(sys.argv[1]))
def fork_one_that_lives():
    child = os.fork()
    if not child:
        signal.pause()
    return child
"""
# The program is killed; or it gives the command up, and goes on.
GONE = """
process = client.popen(["sleep", "97"])
print(fork_one_that_lives(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
GIVEN_UP = """
session = client.open_session(["sleep", "97"])
print(fork_one_that_lives(), flush=True)
session.close()
signal.pause()
"""
FED = """
process = client.popen(["cat"])
process.stdin.write(b"some ")
child = fork_one_that_lives()
print(process.communicate(b"words", timeout=20), flush=True)
os.kill(child, signal.SIGKILL)
"""
# Each ends as a program does, with its buffers written; the child says nothing to the target.
FLUSHED = """
with client.popen(["cat"]) as process:
    process.stdin.write(b"once")
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print(process.communicate(timeout=20), flush=True)
"""
ASKED = """
process = client.popen(["cat"])
if os.fork() == 0:
    try:
        process.wait()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
process.stdin.close()
print(process.wait(20))
"""


def start(script: str, vshd: Vshd) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", HEAD + script, str(vshd.path)]
    return subprocess.Popen(words, env=ENVIRONMENT, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("script", [GONE, GIVEN_UP], ids=["gone", "given-up"])
def test_forked_child_does_not_keep_a_command_alive(vshd: Vshd, script: str) -> None:
    program = start(script, vshd)
    assert program.stdout is not None
    child = int(program.stdout.readline())
    try:
        wait_until(lambda: not vshd.children(), "the command has ended")
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, 9)
        program.kill()
        program.communicate()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(FED, "(b'some words', b'')\n", id="stdin-ends"),
        pytest.param(FLUSHED, "(b'once', b'')\n", id="buffers-are-written-once"),
        pytest.param(
            ASKED,
            "VshError the command belongs to the process that this one was forked from\n0\n",
            id="child-is-told",
        ),
    ],
)
def test_forked_child_has_no_part_in_a_command(vshd: Vshd, script: str, said: str) -> None:
    assert start(script, vshd).communicate(timeout=DEADLINE_S)[0] == said
