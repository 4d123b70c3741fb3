"""Bulk, slow and stalled streams, in both modes: everything arrives, and nothing holds up anything else."""

import contextlib
import hashlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, IS_VSOCK_GUEST, Vshd, ended, read_line, wait_until
from vsh.stdio import FdSource

# The figure of docs/explanation/benchmarks.md; less where both sides are emulated.
BULK = 1 << 26 if IS_VSOCK_GUEST else 1 << 30
# All of it, on a machine that does other things as well.
BULK_DEADLINE_S = 240.0


def find_peak_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def make_noise(size: int) -> Iterator[bytes]:
    """Bytes that differ from block to block, cheaply."""
    block = os.urandom(1 << 16)
    for number in range(size >> 16):
        yield number.to_bytes(8, "little") + block[8:]


def test_gigabyte_goes_there_and_back_unharmed(vshd: Vshd, mode: list[str]) -> None:
    """Through cat, with both directions busy at once and equal hashes; and neither side keeps any of it."""
    sent = hashlib.sha256()
    peaks_mib: list[float] = []

    def feed(stream: IO[bytes]) -> None:
        for block in make_noise(BULK):
            sent.update(block)
            stream.write(block)
        stream.close()

    with ended(vshd.start(*mode, "--", "cat", stdin=subprocess.PIPE)) as client:
        feeder = threading.Thread(target=feed, args=(client.stdin,))
        feeder.start()
        received, size = hashlib.sha256(), 0
        while data := os.read(client.stdout.fileno(), 1 << 18):
            received.update(data)
            size += len(data)
            if size > BULK // 2:
                peaks_mib = peaks_mib or [find_peak_mib(pid) for pid in (client.pid, *vshd.children())]
        feeder.join(BULK_DEADLINE_S)
        assert size == BULK
        assert client.wait(DEADLINE_S) == 0
    assert received.digest() == sent.digest()
    assert len(peaks_mib) == 2
    assert max(peaks_mib) < 32


def find_read_size(pid: int) -> int:
    """What a process has read into its memory."""
    return int(Path(f"/proc/{pid}/io").read_text().partition("rchar:")[2].split()[0])


@pytest.mark.parametrize("way", ["in", "out"])
def test_bulk_passes_both_sides_memory_by(vshd: Vshd, way: str) -> None:
    """It is spliced: neither vsh nor the session reads more than frames' heads, and what came before it was bulk."""
    size = 64 << 20
    script = {
        "in": f"head -c {size // 2} >/dev/null; echo half; cat >/dev/null",
        # In large writes: head's are of 8 KiB, and where the processor is short, one at a time is no bulk.
        "out": f"dd if=/dev/zero bs=1M count={size >> 20} 2>/dev/null; echo half >&2; read line",
    }[way]
    with ended(vshd.start("--", "sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as client:
        stream = client.stdin if way == "in" else client.stdout
        carried = 0
        while carried < size * 3 // 4:
            if way == "in":
                carried += os.write(stream.fileno(), bytes(1 << 20))
            else:
                carried += len(os.read(stream.fileno(), 1 << 20))
        read = [find_read_size(pid) for pid in (client.pid, *vshd.children())]
        assert len(read) == 2
        # At most 1.7 MB in 400 runs on a busy machine.
        assert max(read) < size // 8, read


@pytest.mark.parametrize("sink", ["append", "file", "null", "pipe"])
def test_bulk_arrives_whole_in_every_kind_of_file(vshd: Vshd, sink: str, tmp_path: Path) -> None:
    """Some can be spliced to, some not; what is on its way when that turns out is not lost."""
    path = tmp_path / "out"
    data = b"".join(make_noise(16 << 20))
    source = tmp_path / "in"
    source.write_bytes(data)
    target = Path("/dev/null") if sink == "null" else path
    with target.open("ab" if sink == "append" else "wb") as file, source.open("rb") as stdin:
        argv = vshd.argv("--", "cat")
        if sink == "pipe":
            argv = ["sh", "-c", '"$@" | cat', "sh", *argv]
        done = subprocess.run(argv, env=ENVIRONMENT, stdin=stdin, stdout=file, timeout=BULK_DEADLINE_S, check=False)
    assert done.returncode == 0
    if sink != "null":
        assert path.read_bytes() == data


def test_sessions_that_share_an_open_file_write_over_nothing_of_each_others(vshd: Vshd, tmp_path: Path) -> None:
    """As parallel jobs with one log do: its position is theirs together."""
    size, path = 40_000_000, tmp_path / "out"
    with path.open("wb") as file, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                ended(vshd.start("--", "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' {letter}", stdout=file))
            )
            for letter in "ab"
        ]
        assert [client.wait(BULK_DEADLINE_S) for client in clients] == [0, 0]
    data = path.read_bytes()
    assert (data.count(b"a"), data.count(b"b"), len(data)) == (size, size, 2 * size)


def test_sources_that_share_an_open_file_take_each_byte_once(tmp_path: Path) -> None:
    """Bulk of a file is read, which moves the position for all who have it; that of a pipe passes."""
    path = tmp_path / "in"
    path.write_bytes(bytes(1 << 20))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with path.open("rb") as file:
        sources = {"file": FdSource(file.fileno()), "pipe": FdSource(reading)}
        for _ in range(3):
            # As much as it still holds.
            os.write(writing, bytes(1 << 16))
            for source in sources.values():
                assert source.read(1 << 16)
        assert {name: source.is_bulk for name, source in sources.items()} == {"file": False, "pipe": True}
    sources["pipe"].close()
    os.close(reading)
    os.close(writing)


def test_source_is_closed_without_a_descriptor_to_spare() -> None:
    """Those that there were may be conduits."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading, writing = os.pipe()
    source = FdSource(reading)
    assert source.fd != reading
    top = os.dup(reading)
    os.close(top)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, before[1]))
        source.close()
        assert os.read(reading, 1) == b""
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(reading)
        os.close(writing)


def test_bulk_on_stdout_and_stderr_at_once(vshd: Vshd, mode: list[str]) -> None:
    script = "head -c 20000000 /dev/zero & head -c 20000000 /dev/zero >&2 & wait"
    done = vshd.run(*mode, "--", "sh", "-c", script)
    assert (len(done.stdout), len(done.stderr)) == (20_000_000, 20_000_000)


def test_bulk_into_a_file_and_out_of_one(vshd: Vshd, mode: list[str], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"".join(make_noise(8 << 20)))
    with source.open("rb") as stdin, target.open("ab") as stdout:
        client = vshd.start(*mode, "--", "cat", stdin=stdin, stdout=stdout)
        with ended(client):
            assert client.wait(DEADLINE_S) == 0
    assert target.read_bytes() == source.read_bytes()


def test_sockets_serve_as_stdin_and_stdout(vshd: Vshd, mode: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        ended(vshd.start(*mode, "--", "tr", "a-z", "A-Z", stdin=theirs.fileno(), stdout=theirs.fileno())) as client,
    ):
        theirs.close()
        ours.sendall(b"hello\n")
        ours.shutdown(socket.SHUT_WR)
        assert ours.makefile("rb").read() == b"HELLO\n"
        assert client.wait(DEADLINE_S) == 0


def test_descriptors_that_are_closed(vshd: Vshd, mode: list[str]) -> None:
    argv = vshd.argv(*mode, "--", "sh", "-c", "cat; echo out; echo err >&2; exit 5")
    script = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, "sh", *argv], env=ENVIRONMENT, check=False, timeout=DEADLINE_S)
    assert done.returncode == 5


def test_stalled_stderr_does_not_hold_up_stdout(vshd: Vshd) -> None:
    """Extended mode's promise: each stream has a window of its own."""
    script = "yes >&2 & echo out1; sleep 0.5; echo out2; kill $!; exit 0"
    with ended(vshd.start("--", "sh", "-c", script)) as client:
        assert read_line(client.stdout) == "out1"
        assert read_line(client.stdout) == "out2"
        client.communicate(timeout=DEADLINE_S)
        assert client.returncode == 0


def test_stalled_stdin_of_the_target_does_not_hold_up_signals(vshd: Vshd, mode: list[str]) -> None:
    """The target reads nothing of the megabytes it is sent, and still hears INT."""
    script = "trap 'echo heard; exit 9' INT; echo ready; while :; do sleep 0.05; done"
    with ended(vshd.start(*mode, "--", "sh", "-c", script, stdin=subprocess.PIPE)) as client:
        assert read_line(client.stdout) == "ready"
        # What the pipes and buffers on the way take; legacy mode has no more room behind that.
        os.set_blocking(client.stdin.fileno(), False)
        sent = 0
        while sent < (4 << 20 if not mode else 200_000):
            if not select.select([], [client.stdin], [], 0.5)[1]:
                break
            sent += os.write(client.stdin.fileno(), bytes(65536))
        client.send_signal(signal.SIGINT)
        assert read_line(client.stdout) == "heard"
        assert client.wait(DEADLINE_S) == 9


def test_reader_that_goes_away_ends_the_writer(vshd: Vshd) -> None:
    """vsh -- yes | head -1: the target gets SIGPIPE, as it would without vsh."""
    with ended(vshd.start("--", "sh", "-c", "trap 'exit 3' TERM; echo $$; exec yes")) as client:
        read_line(client.stdout)
        client.stdout.close()
        assert client.wait(DEADLINE_S) == 128 + signal.SIGPIPE
    wait_until(lambda: not vshd.children(), "the session has ended")


def test_reader_that_goes_away_is_141_with_a_legacy_peer(vshd: Vshd) -> None:
    with ended(vshd.start("--noextended", "--", "yes")) as client:
        read_line(client.stdout)
        client.stdout.close()
        assert client.wait(DEADLINE_S) == 141
        assert client.stderr.read() == b""


def test_target_that_reads_one_line_ends_the_feeder(vshd: Vshd, mode: list[str]) -> None:
    """yes | vsh -- head -n 1"""
    done = subprocess.run(
        ["bash", "-c", 'yes | "$@"; echo "${PIPESTATUS[@]}"', "bash", *vshd.argv(*mode, "--", "head", "-n", "1")],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout == b"y\n141 0\n"
    assert done.stderr == b""


def test_target_that_closes_its_stdin_ends_the_feeder_at_once(vshd: Vshd) -> None:
    """The target lives on, but whoever feeds it learns that nobody reads."""
    with ended(vshd.start("--", "sh", "-c", "exec <&-; echo closed; sleep 20", stdin=subprocess.PIPE)) as client:
        assert read_line(client.stdout) == "closed"
        with pytest.raises(BrokenPipeError):
            while True:
                os.write(client.stdin.fileno(), bytes(4096))


def test_disk_that_is_full_is_told(vshd: Vshd, mode: list[str]) -> None:
    with Path("/dev/full").open("wb") as full, ended(vshd.start(*mode, "--", "yes", stdout=full)) as client:
        assert client.wait(DEADLINE_S) == 1
        assert b"vsh: cannot write stdout: No space left on device" in client.stderr.read()


def test_stdin_of_the_shell_is_left_as_it_was(vshd: Vshd, mode: list[str]) -> None:
    """O_NONBLOCK belongs to the open file, which other programs share."""
    reading, writing = os.pipe()
    os.write(writing, b"x\n")
    with ended(vshd.start(*mode, "--", "head", "-1", stdin=reading)) as client:
        assert client.wait(DEADLINE_S) == 0
    assert os.get_blocking(reading)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_after_the_targets_end_ends_vsh(vshd: Vshd, mode: list[str], number: signal.Signals) -> None:
    """Nobody reads the rest of its output: there is no target any more that the signal could be for."""
    with ended(vshd.start(*mode, "--", "sh", "-c", "echo up; head -c 700000 /dev/zero")) as client:
        assert read_line(client.stdout) == "up"
        wait_until(lambda: not vshd.children(), "the session has ended")
        # vsh may learn of the end a moment later: then the first one was for the target.
        while client.poll() is None:
            client.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(2)
        assert client.returncode == 128 + number
        assert client.stderr.read() == b""


def test_signals_while_vsh_ends_change_nothing(vshd: Vshd, mode: list[str]) -> None:
    """The interpreter takes its time to end, and gives the handlers back while it does."""
    for _ in range(5):
        with ended(
            vshd.start(*mode, "--", "sh", "-c", "trap '' TERM; echo up; read line; exit 7", stdin=subprocess.PIPE)
        ) as client:
            assert read_line(client.stdout) == "up"
            client.stdin.close()
            deadline = time.monotonic() + DEADLINE_S
            while client.poll() is None:
                assert time.monotonic() < deadline, "vsh does not end"
                client.terminate()
                time.sleep(0.0005)
            assert client.returncode == 7
