"""Bulk that stays in the kernel: whole, in order, never waited for, and nothing left behind."""

import errno
import gc
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vshd.carry.conduit import (
    CAPACITY,
    Conduit,
    Sluice,
    enlarge_pipe,
    is_worth_it,
    open_conduit,
    open_sluice,
    write_output,
)
from vshd.wire.output import Output

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def conduit() -> Iterator[Conduit]:
    conduit = Conduit()
    yield conduit
    conduit.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's two ends, neither of which blocks."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_bytes_pass_from_a_socket_to_a_pipe(
    conduit: Conduit, pipe: tuple[int, int], sockets: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = sockets
    data = os.urandom(50_000)
    theirs.sendall(data)
    while conduit.size < len(data):
        assert conduit.fill(ours.fileno(), len(data)) > 0
    assert conduit.drain(pipe[1], 20_000) == 20_000
    assert (conduit.size, os.read(pipe[0], 1 << 17)) == (30_000, data[:20_000])
    assert conduit.read(10_000) == data[20_000:30_000]
    assert conduit.drain(pipe[1], 1 << 20) == 20_000
    assert (conduit.size, os.read(pipe[0], 1 << 17)) == (0, data[30_000:])


def test_nothing_there_and_the_end_are_told_apart(
    conduit: Conduit, sockets: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = sockets
    with pytest.raises(BlockingIOError):
        conduit.fill(ours.fileno(), 100)
    theirs.close()
    assert conduit.fill(ours.fileno(), 100) == 0
    assert conduit.size == 0


def test_no_end_is_waited_for(conduit: Conduit, pipe: tuple[int, int]) -> None:
    """A full conduit, and a full pipe behind it."""
    enlarge_pipe(pipe[1], CAPACITY)
    os.write(pipe[1], bytes(CAPACITY))
    assert conduit.fill(pipe[0], 2 * CAPACITY) == CAPACITY
    os.write(pipe[1], bytes(CAPACITY))
    with pytest.raises(BlockingIOError):
        conduit.fill(pipe[0], 1)
    with pytest.raises(BlockingIOError):
        conduit.drain(pipe[1], 1)
    assert conduit.size == CAPACITY


def test_file_that_appends_cannot_be_spliced_and_loses_nothing(
    conduit: Conduit, pipe: tuple[int, int], tmp_path: Path
) -> None:
    os.write(pipe[1], b"whole")
    conduit.fill(pipe[0], 100)
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with pytest.raises(OSError) as caught:
        conduit.drain(fd, 100)
    os.close(fd)
    assert caught.value.errno == errno.EINVAL
    assert conduit.read(5) == b"whole"


def test_reader_that_is_gone_is_told_as_by_write(conduit: Conduit, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    conduit.fill(pipe[0], 1)
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        conduit.drain(writing, 1)
    os.close(writing)


def test_frame_is_one_message_of_head_and_data(pipe: tuple[int, int]) -> None:
    """What a receiver is woken up for: a datagram socket shows where a message ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sluice, output = open_sluice(), Output()
    assert sluice
    with ours, theirs:
        os.write(pipe[1], b"data" * 1000)
        assert sluice.fill(pipe[0], 1 << 18) == 4000
        sluice.append_to(output, b"head")
        assert output.size == 4004
        write_output(output, ours.fileno())
        assert output.size == 0
        assert theirs.recv(1 << 16) == b"head" + b"data" * 1000
    sluice.close()


def test_sluice_carries_pieces_that_take_a_page_each(
    pipe: tuple[int, int], sockets: tuple[socket.socket, socket.socket]
) -> None:
    """As many pages as a conduit has are full with a byte each: the head has none left."""
    ours, theirs = sockets
    arriving, leaving = Conduit(), Conduit()
    sluice, output, data = Sluice(arriving, leaving), Output(), os.urandom(CAPACITY >> 12)
    for number in range(len(data)):
        # Two pipes' pages are not merged.
        os.write(pipe[1], data[number : number + 1])
        assert sluice.fill(pipe[0], 1) == 1
    sluice.append_to(output, b"head")
    received = b""
    while output.size:
        write_output(output, ours.fileno())
        received += theirs.recv(1 << 16)
    assert received == b"head" + data
    assert (arriving.size, leaving.size) == (0, 0)
    sluice.close()


def test_output_keeps_order_between_memory_and_conduit(
    conduit: Conduit, pipe: tuple[int, int], sockets: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = sockets
    rng = random.Random(5)
    for _ in range(50):
        output, expected, received = Output(), b"", b""
        for _ in range(rng.randrange(1, 30)):
            data = rng.randbytes(rng.randrange(1, 3000))
            expected += data
            if rng.random() < 0.5:
                os.write(pipe[1], data)
                assert conduit.fill(pipe[0], len(data)) == len(data)
                output.append_elsewhere(conduit, len(data))
            else:
                output.append(data if rng.random() < 0.5 else memoryview(bytearray(data)))
            if rng.random() < 0.1:
                output.keep()
        while output.size:
            turn = output.elsewhere
            if turn is not None and rng.random() < 0.2:
                assert turn.place is conduit
                output.bring(conduit.read(turn.size))
            write_output(output, ours.fileno())
            received += theirs.recv(1 << 20)
        assert received == expected
        assert (output.elsewhere, conduit.size) == (None, 0)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.12.107+deb13-cloud-amd64", True),
        ("6.7.0", True),
        ("10.0", True),
        ("6.6.99", False),
        ("6.1.0-40-cloud-amd64", False),
        ("5.15", False),
        ("6", False),
        ("", False),
        ("7-rc1", False),
        ("x.y.z", False),
    ],
)
def test_kernels_that_splice_page_by_page_are_spared(release: str, expected: bool) -> None:
    assert is_worth_it(release) is expected


def test_without_pipes_bytes_are_copied() -> None:
    """No descriptors: no conduit, no half of one, no error."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Sockets of earlier tests are closed now and not below, and free numbers among those in use are filled.
    gc.collect()
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    while fillers[-1] <= highest:
        fillers.append(os.open("/dev/null", os.O_RDONLY))
    top = fillers.pop()
    os.close(top)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, before[1]))
        assert open_conduit() is None
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 3, before[1]))
        assert open_sluice() is None
        first = open_conduit()
        assert first is not None
        first.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for filler in fillers:
            os.close(filler)


def test_bulk_is_copied_where_no_descriptor_is_left_to_load_a_module() -> None:
    """In many Pythons fcntl is a file of its own, which the first bulk of a command loads."""
    script = (
        "import os, resource, sys\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from vshd.carry.conduit import enlarge_pipe, open_conduit\n"
        "assert 'fcntl' not in sys.modules\n"
        "_, end = os.pipe()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (end + 1, end + 1))\n"
        "enlarge_pipe(end)\n"
        "os.close(end), os.close(end - 1)\n"
        "conduit = open_conduit()\n"
        "if conduit is not None: conduit.close()\n"
        "assert os.pipe() == (end - 1, end)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
