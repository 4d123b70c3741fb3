"""How `up` and a monitor meet: the plan and its descriptors arrive whole or not at all, and an end is always told."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import vmkit
from vmkit.errors import MachineError
from vmkit.machine import handover, start
from vmkit.machine.argv import QemuPlan
from vmkit.machine.handover import MonitorHandle, receive_plan, start_monitor
from vmkit.machine.launch import LaunchPlan, Report, Stage
from vmkit.machine.parts.part import Fitting, QmpCommand
from vmkit.machine.programs import render_environment

PLAN = LaunchPlan(
    directory=Path("/nonexistent/machines/m"),
    evidence=Path("/nonexistent/state/m"),
    name="m",
    cid=3,
    timeout_s=5.0,
    qemu=QemuPlan(
        argv=("qemu", "-append", "ä 'quoted'"),
        fittings=(Fitting("x", plug=(QmpCommand("device_add", {"id": "x", "n": 1}),)),),
    ),
    record={"name": "m", "cid": 3, "image": "tiny"},
)


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def make_monitor(reports: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> MonitorHandle:
    log = os.fdopen(os.memfd_create("log"), "r+b")
    return MonitorHandle(process or subprocess.Popen(["true"]), reports, log)


def test_plan_arrives_with_its_descriptors(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    read_fd, write_fd = os.pipe()
    make_monitor(ours).launch(PLAN, write_fd, write_fd)
    received = receive_plan(theirs.detach())
    assert received is not None
    assert received.plan == PLAN
    assert received.vhost_fd is not None
    os.close(write_fd)
    assert not os.get_inheritable(received.lock_fd)
    for fd in (received.lock_fd, received.vhost_fd):
        os.write(fd, b"x")
        os.close(fd)
    assert os.read(read_fd, 10) == b"xx"
    os.close(read_fd)


def test_owner_is_watched_by_a_descriptor_of_its_process(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    plan = replace(PLAN, is_owned=True)
    with Path("/dev/null").open() as null:
        make_monitor(ours).launch(plan, null.fileno(), None)
    received = receive_plan(theirs.detach())
    assert received is not None
    assert (received.plan, received.vhost_fd) == (plan, None)
    assert received.owner_fd is not None
    facts = Path(f"/proc/self/fdinfo/{received.owner_fd}").read_text()
    assert f"Pid:\t{os.getpid()}\n" in facts
    assert not select.select([received.owner_fd], [], [], 0)[0]
    os.close(received.owner_fd)
    os.close(received.lock_fd)


def test_plan_that_arrives_byte_by_byte_is_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    text = PLAN.render().encode()
    message = len(text).to_bytes(4, "little") + text
    with Path("/dev/null").open() as null:
        socket.send_fds(ours, [message[:1]], [null.fileno()])

    def trickle() -> None:
        for offset in range(1, len(message)):
            ours.sendall(message[offset : offset + 1])

    thread = threading.Thread(target=trickle)
    thread.start()
    received = receive_plan(theirs.detach())
    thread.join()
    assert received is not None
    assert received.plan == PLAN
    assert received.vhost_fd is None
    os.close(received.lock_fd)


@pytest.mark.parametrize(
    "message", [b"", b"\x01", b"\x05\0\0\0abc", b"\0\0\0\0", b"\xff\xff\xff\xff" + b"x" * 100, b"\x02\0\0\0{}"]
)
def test_no_plan_or_half_a_plan_is_none(pair: tuple[socket.socket, socket.socket], message: bytes) -> None:
    """The last one is whole, but came without the lock."""
    ours, theirs = pair
    ours.sendall(message)
    ours.close()
    assert receive_plan(theirs.detach()) is None


def test_monitor_without_a_plan_ends_without_a_trace(folders: Path) -> None:
    with pytest.raises(KeyError), start_monitor() as monitor:
        process = monitor.process
        raise KeyError
    assert process.poll() is not None
    assert list((folders / "runtime").iterdir()) == []


def test_monitor_that_is_gone_is_told_with_what_it_said(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    monitor = make_monitor(ours)
    monitor.early_log.write(b"No module named vmkit\n")
    monitor.early_log.flush()
    with pytest.raises(MachineError, match="did not start") as caught, Path("/dev/null").open() as null:
        monitor.launch(PLAN, null.fileno(), None)
    assert caught.value.details == "No module named vmkit\n"


def test_monitor_that_takes_no_plan_is_given_up(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "LAUNCH_DEADLINE_S", 0.05)
    big = replace(PLAN, record={"fill": "x" * 4_000_000})
    with pytest.raises(MachineError, match="did not start"), Path("/dev/null").open() as null:
        make_monitor(pair[0]).launch(big, null.fileno(), None)


def test_of_a_long_log_the_end_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    monitor = make_monitor(pair[0])
    monitor.early_log.write(b"x" * 100_000 + b"the cause")
    monitor.early_log.flush()
    text = monitor.read_log(PLAN)
    assert len(text) == handover.MAX_LOG_TAIL_BYTES
    assert text.endswith("the cause")


def test_log_of_an_earlier_machine_is_not_quoted(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    (tmp_path / "monitor.log").write_text("of last week")
    assert make_monitor(pair[0]).read_log(replace(PLAN, evidence=tmp_path)) == ""


def await_ready(monitor: MonitorHandle) -> list[str]:
    said: list[str] = []
    start._await_ready(PLAN, monitor, lambda text, _fraction: said.append(text))
    return said


def test_reports_are_told_until_ready(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    for stage in (Stage.STARTED, Stage.RUNNING, Stage.READY):
        theirs.sendall(Report(stage).render())
    assert await_ready(make_monitor(ours)) == ["plugging the vsock device", "booting"]


def test_report_of_a_failure_becomes_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(Report(Stage.FAILED, "it broke", "line 1\nline 2", "").render())
    with pytest.raises(MachineError, match="'m' did not start: it broke") as caught:
        await_ready(make_monitor(ours))
    assert caught.value.details == "line 1\nline 2"
    assert caught.value.hint == "the logs are kept: vmkit logs m"


@pytest.mark.parametrize("said", [b"", b'{"stage": "star'])
def test_monitor_that_ends_without_a_word_is_told(pair: tuple[socket.socket, socket.socket], said: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(said)
    theirs.close()
    with pytest.raises(MachineError, match="ended without a report"):
        await_ready(make_monitor(ours))


def test_monitor_that_was_killed_with_our_words_unread_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"unread")
    theirs.close()
    with pytest.raises(MachineError, match="ended without a report"):
        await_ready(make_monitor(ours))


def test_monitor_that_falls_silent_is_given_up(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "MONITOR_GRACE_S", 0.05 - PLAN.timeout_s)
    with pytest.raises(MachineError, match="the monitor of 'm' does not answer any more"):
        await_ready(make_monitor(pair[0]))


def test_error_ends_the_monitor_that_had_been_let_go(pair: tuple[socket.socket, socket.socket]) -> None:
    """Between READY and the end of the block: a closed socket alone would mean farewell."""
    process = subprocess.Popen(["sleep", "100"])
    with pytest.raises(KeyboardInterrupt), make_monitor(pair[0], process).ended_on_error():
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGTERM


def test_monitor_that_ignores_its_end_is_killed(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "ABORT_DEADLINE_S", 0.05)
    process = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(KeyboardInterrupt), make_monitor(pair[0], process).ended_on_error():
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGKILL


def test_second_interrupt_does_not_cut_the_clean_up_short(pair: tuple[socket.socket, socket.socket]) -> None:
    """With another thread running, as a progress bar has one: a signal mask of the main thread would not do."""
    process = subprocess.Popen(["sh", "-c", f"trap 'kill -INT {os.getpid()}; sleep 0.2; exit 7' TERM; echo; read x"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyError), make_monitor(pair[0], process).ended_on_error():
            raise KeyError
    finally:
        done.set()
        thread.join()
    assert process.poll() == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_environment_names_where_vmkit_was_found() -> None:
    root = str(Path(vmkit.__file__).parents[1])
    assert render_environment({"A": "b"}) == {"A": "b", "PYTHONPATH": root}


def test_relative_python_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    paths = render_environment({"PYTHONPATH": ":lib:/x::."})["PYTHONPATH"].split(":")
    assert paths[1:] == ["/usr/lib", "/x", "/usr"]


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_installed_vmkit_is_not_put_before_the_standard_library(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmkit, "__file__", f"/usr/lib/python3/{folder}/vmkit/__init__.py")
    assert "PYTHONPATH" not in render_environment({})
    assert render_environment({"PYTHONPATH": "/x"})["PYTHONPATH"] == "/x"


def test_monitor_is_found_from_a_checkout_that_is_not_installed(folders: Path, tmp_path: Path) -> None:
    """The Python below our virtual environment knows no vmkit: only the working directory leads to it."""
    script = (
        "from vmkit.machine.handover import start_monitor\n"
        "with start_monitor() as m:\n"
        "    m.reports.close()\n"
        "    print(m.process.wait(20), m.read_log.__name__)\n"
    )
    (tmp_path / "vmkit").symlink_to(Path(vmkit.__file__).parent)
    for name in ("vsh", "vshd"):
        (tmp_path / name).symlink_to(Path(vmkit.__file__).parents[1] / name)
    done = subprocess.run(
        [vars(sys)["_base_executable"], "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "0 read_log\n", done.stderr
