"""The list of system calls as a program: run here for real, with calls that do no harm."""

import errno
import os
import platform
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.image.wall.btf_maker import make_kernel_btf
from vmkit.image.formats.elf import is_elf, read_needed
from vmkit.image.wall.btf import BtfError
from vmkit.image.wall.layer import find_vshd_port, make_loader
from vmkit.image.wall.loader import Loader

needs_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
# arch/x86/entry/syscalls/syscall_64.tbl.
WRITE, OPEN, CLOSE, PREAD64, PIPE = 1, 2, 3, 17, 22

Run = Callable[[Loader], "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run_loader(loader: Loader) -> "subprocess.CompletedProcess[bytes]":
        path = tmp_path / "loader"
        path.write_bytes(loader.render())
        path.chmod(0o700)
        return subprocess.run([path], capture_output=True, check=False, timeout=30)

    return run_loader


@needs_x86_64
def test_steps_run_in_order_and_results_go_where_they_are_wanted(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    loader = Loader()
    seen, sizes = loader.data(bytes(16)), loader.data(b"\xff" * 8)
    loader.call("open", OPEN, loader.text(str(file)), os.O_RDONLY)
    loader.call("read", PREAD64, 3, seen, 16, 4, result_to=sizes.at(4))
    loader.compare("content", seen, loader.data(b"456789\0\0"), 8)
    loader.call("write", WRITE, 1, sizes, 8)
    done = run(loader)
    assert (done.returncode, done.stdout) == (0, b"\xff\xff\xff\xff" + struct.pack("<I", 6))


@needs_x86_64
def test_pointers_in_data_are_addresses(run: Run) -> None:
    loader = Loader()
    text = loader.text("pointed at")
    # struct iovec of writev(2), number 20.
    vector = loader.data(struct.pack("<QQ", 0, 7), [(0, text.at(3))])
    loader.call("writev", 20, 1, vector, 1)
    assert run(loader).stdout == b"nted at"


@needs_x86_64
def test_first_failure_ends_it_with_its_label_and_errno(run: Run, tmp_path: Path) -> None:
    loader = Loader()
    loader.call("the file is not there", OPEN, loader.text(str(tmp_path / "nowhere")), 0)
    loader.call("never", WRITE, 1, loader.text("never"), 5)
    done = run(loader)
    assert (done.returncode, done.stdout) == (1, b"the file is not there" + bytes([errno.ENOENT]))


@needs_x86_64
def test_comparing_tells_a_difference_in_the_last_byte_alone(run: Run) -> None:
    loader = Loader()
    one = loader.data(b"abcdefghi")
    loader.compare("prefix", one, loader.data(b"abcdefghX"), 8)
    loader.compare("nothing", one, loader.data(b"X"), 0)
    loader.compare("they differ", one, loader.data(b"abcdefghX"), 9)
    done = run(loader)
    assert (done.returncode, done.stdout) == (1, b"they differ" + bytes([errno.ESTALE]))


def test_program_is_small_static_and_has_no_page_that_is_written_and_run() -> None:
    loader = make_loader(make_kernel_btf(), (), 9001)
    assert is_elf(loader)
    assert read_needed(loader) == ()
    assert len(loader) < 3 * 4096
    count = struct.unpack_from("<H", loader, 56)[0]
    flags = [struct.unpack_from("<II", loader, 64 + index * 56) for index in range(count)]
    assert flags == [(1, 5), (1, 6), (0x6474E551, 6)]


@needs_x86_64
def test_loader_refuses_another_kernel_before_it_changes_anything(tmp_path: Path) -> None:
    """This host's BTF, if any, is not the made one: the loader ends before it mounts or loads."""
    path = tmp_path / "loader"
    path.write_bytes(make_loader(make_kernel_btf(), (), 9001))
    path.chmod(0o700)
    done = subprocess.run([path], capture_output=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stdout[:-1] in (
        b"the kernel has no BTF",
        b"this is not the kernel that the image was built with",
    )


def test_kernel_without_btf_is_told() -> None:
    with pytest.raises(BtfError, match="ends inside its header"):
        make_loader(b"", (), 9001)


@pytest.mark.parametrize(
    ("flags", "port"),
    [
        (None, 9001),
        ((), 9001),
        (("--allow_user=user",), 9001),
        (("--listen=vsock:9002",), 9002),
        (("-listen=vsock:1", "--listen=vsock:2"), 2),
        (("--listen=unix:/run/vshd",), 9001),
    ],
)
def test_port_is_the_one_vshd_is_told(flags: object, port: int) -> None:
    assert find_vshd_port(flags) == port
