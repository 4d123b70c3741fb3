"""qcow2 disks as qemu-img makes them: their guest's view, and what they may not make vmkit read."""

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vmkit.roots.disks import MIB, make_disk, make_file_system, run
from vmkit.errors import BuildError, ConfigError
from vmkit.roots.disk import choose_root
from vmkit.roots.extents import HostFile
from vmkit.roots.qcow2 import Qcow2Disk, read_header, require_named
from vmkit.roots.superblocks import Reader


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partitioned disk with an ext4, text that compresses, noise that does not, and holes."""
    folder = tmp_path_factory.mktemp("raw")
    ext4 = make_file_system("ext4", folder / "ext4")
    disk = make_disk(folder / "disk", "label: gpt\nstart=1MiB, size=8MiB, type=linux\n", {1: ext4}, 16 * MIB)
    with disk.open("r+b") as file:
        file.seek(10 * MIB)
        file.write(random.Random(1).randbytes(300_000))
        file.seek(12 * MIB)
        file.write(b"words " * 50_000)
    return disk


@pytest.fixture(name="reads")
def fixture_reads() -> Iterator[Callable[[Path], Reader]]:
    """Readers of files, which close with the test."""
    with ExitStack() as files:
        yield lambda path: files.enter_context(HostFile(path)).read


@pytest.fixture
def open_disk(reads: Callable[[Path], Reader]) -> Callable[[Path], Qcow2Disk]:
    return lambda path: Qcow2Disk(read_header(reads(path)), reads(path))


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "compat=0.10"],
        [],
        ["-c"],
        ["-c", "-o", "cluster_size=4096"],
        ["-o", "cluster_size=2M"],
        ["-o", "extended_l2=on"],
        ["-o", "cluster_size=512"],
    ],
    ids=" ".join,
)
def test_content_is_what_qemu_shows(
    tmp_path: Path, open_disk: Callable[[Path], Qcow2Disk], raw: Path, options: list[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", *options, raw, path)
    disk = open_disk(path)
    assert disk.size_bytes == 16 * MIB
    assert disk.read(0, disk.size_bytes + 100) == raw.read_bytes()
    rng, content = random.Random(2), raw.read_bytes()
    for _ in range(50):
        at, length = rng.randrange(16 * MIB), rng.randrange(70_000)
        assert disk.read(at, length) == content[at : at + length]
    found = choose_root(disk.read, disk.size_bytes, "disk.qcow2")
    assert found.partition is not None
    assert found.partition.number == 1


def test_zstd_is_told_with_the_way_out(tmp_path: Path, open_disk: Callable[[Path], Qcow2Disk], raw: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, path)
    with pytest.raises(BuildError, match="compressed with zstd") as caught:
        open_disk(path).read(0, 512)
    assert "qemu-img convert" in caught.value.hint


def test_backing_file_is_read_only_where_the_user_names_it(
    tmp_path: Path, reads: Callable[[Path], Reader], raw: Path
) -> None:
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, path)
    header = read_header(reads(path))
    with pytest.raises(ConfigError, match=f"needs the backing file {raw}, which you have not named"):
        require_named(header, path, ())
    with pytest.raises(ConfigError, match="you have not named"):
        require_named(header, path, (tmp_path / "missing", tmp_path))
    assert require_named(header, path, (raw,)) == (raw,)
    disk = Qcow2Disk(header, reads(path), backing=reads(raw))
    assert disk.read(0, 16 * MIB) == raw.read_bytes()


def test_data_file_is_read_only_where_the_user_names_it(
    tmp_path: Path, reads: Callable[[Path], Reader], raw: Path
) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    run("qemu-img", "convert", "-O", "qcow2", "-o", f"data_file={data}", raw, path)
    header = read_header(reads(path))
    with pytest.raises(ConfigError, match=f"needs the data file {data}"):
        require_named(header, path, ())
    assert require_named(header, path, (data,)) == (data,)
    assert Qcow2Disk(header, reads(path), data=reads(data)).read(0, 16 * MIB) == raw.read_bytes()


def test_name_that_is_a_protocol_of_qemu_is_refused(tmp_path: Path, reads: Callable[[Path], Reader], raw: Path) -> None:
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-u", "-f", "qcow2", "-F", "raw", "-b", "nbd://localhost/x", path, "1M")
    with pytest.raises(ConfigError, match="'nbd://localhost/x', which is no plain file"):
        require_named(read_header(reads(path)), path, (raw,))


def test_damage_is_an_error_and_no_wrong_content(
    tmp_path: Path, open_disk: Callable[[Path], Qcow2Disk], raw: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", raw, path)
    good = path.read_bytes()
    for change, seen in (
        ((4, struct.pack(">I", 9)), "has version 9"),
        ((20, struct.pack(">I", 63)), "sizes that no disk has"),
        ((32, struct.pack(">I", 1)), "is encrypted"),
        ((36, struct.pack(">I", 0)), "its first table is too short"),
        ((40, struct.pack(">Q", 1 << 50)), "a table of it lies behind its end"),
        ((72, struct.pack(">Q", 2)), "is marked as corrupt"),
        ((72, struct.pack(">Q", 1 << 30)), "features that vmkit does not know"),
        ((72, struct.pack(">Q", 4)), "needs a data file and does not name it"),
    ):
        path.write_bytes(good[: change[0]] + change[1] + good[change[0] + len(change[1]) :])
        with pytest.raises(BuildError, match=seen) as caught:
            open_disk(path).read(0, 512)
        assert caught.value.hint
    path.write_bytes(good[:50])
    with pytest.raises(BuildError, match="no whole header"):
        open_disk(path)
