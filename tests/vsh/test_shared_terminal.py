"""Several clients at one terminal: it is raw while one of them needs it, and never after the last, however they end."""

import itertools
import os
import shlex
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vsh.live import Vshd, wait_for_end, wait_until
from tests.vsh.typist import Typist

# Runs what it is told on a pipe, so that nothing need be typed. What it starts has the terminal, as its own stdin.
SHELL = 'exec 3<&0; while read -r line <&{}; do eval "$line"; done'


class Stage:
    """A terminal, and clients at it, each in the foreground. `pids` are theirs."""

    def __init__(self, vshd: Vshd, folder: Path) -> None:
        self._vshd = vshd
        self._folder = folder
        reading, self._orders = os.pipe()
        self.typist = Typist(["bash", "--norc", "-c", SHELL.format(reading)], pass_fds=(reading,))
        os.close(reading)
        self.pids: dict[str, int] = {}

    def start(self, name: str) -> None:
        if not (self._folder / name).exists():
            os.mkfifo(self._folder / name)
        script = f"echo {name} is up; read x <{self._folder / name}"
        command = shlex.join([sys.executable, "-m", "vsh", *self._vshd.where, "--", "sh", "-c", script])
        self.order(f"{command} <&3 & {name}=$!; echo pid ${name}.")
        self.typist.expect(b"pid ")
        self.pids[name] = int(self.typist.expect(b"."))
        self.typist.expect(f"{name} is up".encode())

    def end(self, name: str) -> None:
        (self._folder / name).write_bytes(b"\n")
        self.order(f"wait ${name}; echo {name} has gone")
        self.typist.expect(f"{name} has gone".encode())

    def kill(self, name: str, *, with_guardian: bool = False) -> None:
        """SIGKILL, once there is a guardian."""
        guardian = self.guardian(name)
        if with_guardian:
            os.kill(guardian, signal.SIGKILL)
        os.kill(self.pids[name], signal.SIGKILL)
        self.order(f"wait ${name}; echo {name} has gone")
        self.typist.expect(f"{name} has gone".encode())

    def guardian(self, name: str) -> int:
        pid = self.pids[name]
        wait_until(lambda: self._children(pid), "the guardian is there")
        (guardian,) = self._children(pid)
        return guardian

    def order(self, line: str) -> None:
        os.write(self._orders, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._orders)
        for pid in self.pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.typist.close()

    @staticmethod
    def _children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def stage(vshd: Vshd, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(vshd, tmp_path)
    yield stage
    stage.close()


def do(stage: Stage, how: str, name: str) -> None:
    match how:
        case "end":
            stage.end(name)
        case "kill":
            stage.kill(name)
        case "kill both":
            stage.kill(name, with_guardian=True)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize(("first", "last"), [*itertools.product(["end", "kill", "kill both"], ["end", "kill"])])
def test_terminal_is_raw_until_the_last_client_ends(stage: Stage, order: str, first: str, last: str) -> None:
    stage.start("a")
    stage.start("b")
    do(stage, first, order[0])
    assert stage.typist.is_raw()
    do(stage, last, order[1])
    wait_until(stage.typist.is_restored, "the terminal is as it was")


def test_next_client_mends_what_a_killed_one_left(stage: Stage) -> None:
    stage.start("a")
    stage.kill("a", with_guardian=True)
    assert stage.typist.is_raw()
    stage.start("b")
    stage.end("b")
    assert stage.typist.is_restored()


def test_record_of_a_killed_client_does_not_undo_what_was_set_since(stage: Stage) -> None:
    stage.start("a")
    stage.kill("a", with_guardian=True)
    now = termios.tcgetattr(stage.typist.slave)
    now[3] |= termios.ICANON | termios.ECHO
    termios.tcsetattr(stage.typist.slave, termios.TCSANOW, now)
    stage.start("b")
    assert stage.typist.is_raw()
    stage.end("b")
    after = termios.tcgetattr(stage.typist.slave)
    assert after[:6] == now[:6]
    # The library has numbers for two of them where lines are not edited, as they were for `now`.
    assert [ord(value) for value in after[6]] == [value if isinstance(value, int) else ord(value) for value in now[6]]


def test_client_that_is_stopped_does_not_keep_the_terminal_raw(stage: Stage) -> None:
    stage.start("a")
    stage.start("b")
    os.kill(stage.pids["a"], signal.SIGSTOP)
    stat = Path(f"/proc/{stage.pids['a']}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
    stage.end("b")
    assert stage.typist.is_restored()
    os.kill(stage.pids["a"], signal.SIGCONT)
    wait_until(stage.typist.is_raw, "the terminal is raw again")
    stage.end("a")
    assert stage.typist.is_restored()


def test_record_that_is_lost_meanwhile_is_made_again(stage: Stage) -> None:
    """With the user's last login, XDG_RUNTIME_DIR goes; what is in tmux stays."""
    stage.start("a")
    shutil.rmtree(stage.typist.runtime.name)
    Path(stage.typist.runtime.name).mkdir(0o700)
    stage.start("b")
    stage.end("a")
    assert stage.typist.is_raw()
    stage.end("b")
    assert stage.typist.is_restored()


def test_damaged_record_is_no_obstacle(stage: Stage) -> None:
    stage.start("a")
    (record,) = (Path(stage.typist.runtime.name) / "terminals").iterdir()
    for damage in (b"", b"original 1 2\nraw 1\nend\n", b"\xff\n", b"raw x\nend\n", record.read_bytes()[:-4]):
        record.write_bytes(damage)
        stage.start("b")
        stage.kill("b", with_guardian=True)
    stage.end("a")
    assert stage.typist.is_restored()


@pytest.mark.parametrize("do_harm", [shutil.rmtree, lambda path: path.chmod(0o755)], ids=["gone", "open to others"])
def test_terminal_is_restored_without_a_record(stage: Stage, do_harm: Callable[[Path], None]) -> None:
    stage.start("a")
    runtime = Path(stage.typist.runtime.name)
    do_harm(runtime)
    stage.end("a")
    assert stage.typist.is_restored()
    stage.start("b")
    stage.kill("b")
    wait_until(stage.typist.is_restored, "the terminal is as it was")
    runtime.mkdir(exist_ok=True)


def test_nothing_is_left(stage: Stage) -> None:
    """Neither a process nor a file: a guardian that stayed would keep pipes and the terminal open."""
    stage.start("a")
    guardian = stage.guardian("a")
    stage.end("a")
    wait_for_end(guardian)
    assert list((Path(stage.typist.runtime.name) / "terminals").iterdir()) == []


def test_guardian_keeps_nothing_open(stage: Stage) -> None:
    stage.start("a")
    guardian = stage.guardian("a")
    folder = Path(f"/proc/{guardian}/fd")
    wait_until(lambda: len(list(folder.iterdir())) == 2, "it has let go of all but the pipe and the terminal")
    assert os.getsid(guardian) == guardian


def test_signal_for_the_guardian_is_not_its_clients(stage: Stage) -> None:
    stage.start("a")
    guardian = stage.guardian("a")
    os.kill(guardian, signal.SIGTERM)
    stage.end("a")
    wait_for_end(guardian)
    assert stage.typist.is_restored()
