"""`vmkit docker run|test|bench`: streams, statuses, results, ends of every kind; nothing is left running."""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.vmkit.docker.conftest import DEADLINE_S, Docker, Play, command, environment
from tests.vmkit.docker.fake_engine import CONTAINER
from tests.vsh.typist import Typist
from vmkit.docker.container import LABEL, describe_client


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(pid)
        assert select.select([ended], [], [], DEADLINE_S)[0]
        os.close(ended)


def test_run_passes_streams_and_status_on(play: Play, docker: Docker) -> None:
    engine = play()
    done = docker("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert done.stderr.endswith(b"err\n")
    assert engine.removed == [CONTAINER]


def test_status_that_no_process_can_have_is_a_fault(play: Play, docker: Docker) -> None:
    """The low byte of 256 is that of success."""
    engine = play(status=256)
    done = docker("run", "--", "true")
    assert done.returncode == 1
    assert b"the engine reported the exit status 256, which no process can have" in done.stderr
    assert engine.removed == [CONTAINER]


def test_run_asks_for_no_privileges(play: Play, docker: Docker) -> None:
    engine = play()
    docker("run", "--", "true")
    host = engine.created["HostConfig"]
    assert set(host) == {"NetworkMode", "Devices", "GroupAdd"}
    assert host["NetworkMode"] == "none"
    # What leads to somebody else's host stays denied inside.
    assert "VSH_AF_VSOCK=deny" in engine.created["Env"]


def test_run_says_what_it_passed(play: Play, docker: Docker) -> None:
    play()
    told = docker("run", "--", "true").stderr.decode()
    assert "passed /dev/kvm: " in told
    assert "not passed /dev/vhost-vsock: VSH_AF_VSOCK=deny is set" in told


def test_stdin_is_the_commands_when_asked(play: Play, docker: Docker) -> None:
    play()
    assert docker("run", "-i", "--", "cat", stdin=b"words\n" * 10000).stdout == b"words\n" * 10000


def test_stdin_is_nobodys_by_default(play: Play, docker: Docker) -> None:
    play()
    assert docker("run", "--", "cat", stdin=b"words").stdout == b""


@pytest.mark.parametrize(("path", "status"), [("/nonexistent", 127), ("/etc/passwd", 126)])
def test_command_that_cannot_run(play: Play, docker: Docker, path: str, status: int) -> None:
    play()
    done = docker("run", "--", path)
    assert done.returncode == status
    assert f"cannot run '{path}'".encode() in done.stderr


def test_test_takes_results_out_even_of_a_failure(play: Play, docker: Docker, tmp_path: Path) -> None:
    play(results={"results/junit.xml": b"<x/>", "results/evidence/a/console.log": b"log"})
    done = docker(
        "test", "--out", str(tmp_path / "out"), "--image", "x", "--env", "A=b", "-k", "nothing-is-called-so", "-q"
    )
    assert done.returncode == 5
    assert (tmp_path / "out/junit.xml").read_bytes() == b"<x/>"
    assert (tmp_path / "out/evidence/a/console.log").read_bytes() == b"log"
    assert b"2 files of results" in done.stderr


def test_bench_passes_words_and_status_on_and_takes_figures_out(play: Play, docker: Docker, tmp_path: Path) -> None:
    engine = play(results={"results/bench.json": b"{}", "results/bench/bench.html": b"page"})
    done = docker("bench", "--out", str(tmp_path / "out"), "--quick", "--accel=magic")
    assert done.returncode == 64
    assert b"'magic' is not one of" in done.stderr
    assert engine.created["Image"] == "vmkit:test"
    assert engine.created["Cmd"][-2:] == ["--quick", "--accel=magic"]
    assert engine.created["HostConfig"]["NetworkMode"] == "bridge"
    assert (tmp_path / "out/bench/bench.html").read_bytes() == b"page"


@pytest.mark.parametrize("name", ["results/../../escaped", "/etc/escaped", "results/a/../../../escaped"])
def test_results_stay_in_their_folder(play: Play, docker: Docker, tmp_path: Path, name: str) -> None:
    play(results={name: b"evil", "results/good": b"good"})
    assert docker("run", "--out", str(tmp_path / "out"), "--", "true").returncode == 0
    assert (tmp_path / "out/good").read_bytes() == b"good"
    assert all(path.is_relative_to(tmp_path / "out") for path in tmp_path.rglob("*"))
    assert not list(tmp_path.parent.glob("escaped"))


def test_interruption_ends_the_container_and_takes_results(play: Play, tmp_path: Path) -> None:
    engine = play(results={"results/half": b"half"})
    words = command("run", "--out", str(tmp_path), "--", "sh", "-c", "echo up; exec sleep 600")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 128 + signal.SIGINT
    assert b"interrupted" in err
    assert engine.removed == [CONTAINER]
    assert (tmp_path / "half").exists()
    assert engine.process is not None
    assert engine.process.wait(DEADLINE_S) is not None


def test_killed_client_takes_its_container_along(play: Play) -> None:
    """Nobody is left to stop it: the leash notices."""
    engine = play()
    words = command("run", "--", "sh", "-c", "echo $$; exec sleep 600")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        inner = int(client.stdout.readline())
        client.kill()
    wait_for_end(inner)
    assert engine.process is not None
    assert engine.process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_next_command_sweeps_what_a_killed_client_left(play: Play, docker: Docker) -> None:
    boot, pid, start = describe_client().split()
    dead = f"{boot} {pid} {int(start) + 1}"
    living = f"{boot} {pid} {start}"
    elsewhere = f"another-boot {pid} 1"
    engine = play(
        others=[
            {"Id": name * 32, "Labels": {LABEL: label}}
            for name, label in (("aa", dead), ("bb", living), ("cc", elsewhere))
        ]
    )
    done = docker("run", "--", "true")
    assert engine.removed == ["aa" * 32, CONTAINER]
    assert b"removed the container aaaaaaaaaaaa of a vmkit that was killed" in done.stderr


def test_image_that_is_not_there(play: Play, docker: Docker) -> None:
    play(create_error=(404, "No such image: vmkit:latest"))
    done = docker("run", "--", "true")
    assert done.returncode == 64
    assert b"the image is not built yet" in done.stderr
    assert b"hint: build it: vmkit docker build" in done.stderr


def test_full_disk_of_the_engine(play: Play, docker: Docker) -> None:
    play(create_error=(500, "mkdir /var/lib/docker/overlay2/x: no space left on device"))
    done = docker("run", "--", "true")
    assert done.returncode == 1
    assert b"the engine's disk is full" in done.stderr
    assert b"docker system prune" in done.stderr


def test_shell_needs_a_terminal(play: Play, docker: Docker) -> None:
    play()
    done = docker("shell")
    assert done.returncode == 64
    assert b"stdin is no terminal" in done.stderr


def at_a_terminal(script: str) -> bytes:
    """What a shell script prints at a terminal of its own, before it prints `done`."""
    typist = Typist(["bash", "--norc", "-c", f"{script}; echo do''ne"], env=environment())
    try:
        return typist.expect(b"done\r\n")
    finally:
        typist.close()


def test_run_in_the_background_of_a_terminal_goes_without_it(play: Play, socket: Path) -> None:
    engine = play()
    at_a_terminal(f"timeout {DEADLINE_S} {shlex.join(command('run', '-i', '--', 'true'))}")
    assert engine.created["Tty"] is False
    assert engine.removed == [CONTAINER]


def test_shell_in_the_background_of_a_terminal_is_refused(play: Play, socket: Path) -> None:
    play()
    told = at_a_terminal(f"timeout {DEADLINE_S} {shlex.join(command('shell'))}")
    assert b"vmkit: another job has the terminal" in told


def test_variable_without_a_value(docker: Docker) -> None:
    assert docker("run", "--env", "A", "--", "true").returncode == 64


def test_no_engine(docker: Docker) -> None:
    done = docker("run", "--", "true")
    assert done.returncode == 1
    assert b"no Docker engine answers at unix://" in done.stderr
    assert b"apt-get install docker.io" in done.stderr


def test_engine_that_died(docker: Docker, socket: Path) -> None:
    """Its socket is there, and nobody behind it."""
    subprocess.run(["python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(socket)!r})"], check=True)
    assert b"no Docker engine answers at unix://" in docker("run", "--", "true").stderr


@pytest.mark.root
def test_no_permission(play: Play, docker: Docker, socket: Path) -> None:
    play()
    socket.parent.chmod(0o755)
    socket.chmod(0o600)
    code = """
import os, docker.api, docker.utils
from vmkit.errors import VmkitError
from vmkit.docker.engine import open_engine
os.setuid(65534)
try:
    with open_engine():
        pass
except VmkitError as error:
    print(error.render("vmkit"))
"""
    done = subprocess.run([command()[0], "-c", code], capture_output=True, check=False, timeout=DEADLINE_S)
    assert b"this user cannot open the socket of the Docker engine" in done.stdout, done.stderr
    assert b"usermod -aG docker" in done.stdout


def test_created_container_is_valid_json(play: Play, docker: Docker) -> None:
    engine = play()
    docker("run", "--user", "root", "--network", "host", "--env", "A=b=c", "--", "true", "--flag")
    assert json.dumps(engine.created)
    assert engine.created["User"] == "root"
    assert engine.created["HostConfig"]["NetworkMode"] == "host"
    assert "A=b=c" in engine.created["Env"]
    assert engine.created["Cmd"][-2:] == ["true", "--flag"]
    assert engine.created["Labels"][LABEL]
