"""The root in a disk that sfdisk has partitioned and mkfs has filled: found, chosen, or refused with what is there."""

import struct
from pathlib import Path

import pytest

from tests.vmkit.roots.disks import MIB, SIZES, make_disk, make_file_system
from vmkit.errors import BuildError, ConfigError
from vmkit.roots.disk import DiskRoot, choose_root
from vmkit.roots.extents import HostFile
from vmkit.roots.partitions import read_table
from vmkit.roots.superblocks import FileSystemKind

CLOUD = """label: gpt
start=20MiB, size=8MiB, type=4f68bce3-e8cd-4db1-96e7-fbcaf984b709, name="root"
start=1MiB, size=1MiB, type=21686148-6449-6e6f-744e-656564454649
start=2MiB, size=8MiB, type=0fc63daf-8483-4772-8e79-3d69d8477de4, name="other"
"""


def choose(path: Path, number: int | None = None) -> DiskRoot:
    with HostFile(path) as file:
        return choose_root(file.read, file.size_bytes, path.name, number)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file_system("ext4", tmp_path_factory.mktemp("fs") / "ext4", "system")


@pytest.mark.parametrize("kind", list(FileSystemKind))
def test_whole_disk_is_known_by_its_superblock(tmp_path: Path, kind: FileSystemKind) -> None:
    path = make_file_system(kind, tmp_path / "disk", "mine")
    found = choose(path)
    assert (found.file_system.kind, found.partition, found.table, found.file_system.trouble) == (kind, None, None, "")
    assert found.file_system.label == ("" if kind in ("squashfs", "erofs") else "mine")
    assert found.file_system.size_bytes == SIZES.get(kind, found.file_system.size_bytes)
    with pytest.raises(ConfigError, match=f"disk has no partitions: it is one {kind} file system"):
        choose(path, 1)


def test_file_that_was_cut_off_is_told(tmp_path: Path, ext4: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(ext4.read_bytes()[: 2 * MIB])
    with pytest.raises(ConfigError, match=f"disk is cut off: its ext4 has {4 * MIB} bytes, and {2 * MIB} are there"):
        choose(path)


def test_journal_that_was_not_replayed_is_told(tmp_path: Path, ext4: Path) -> None:
    data = bytearray(ext4.read_bytes())
    data[1024 + 96] |= 0x4
    path = tmp_path / "disk"
    path.write_bytes(data)
    assert choose(path).file_system.trouble == "its journal was not replayed, because it was not unmounted"


def test_type_of_a_partition_tells_the_root_of_a_cloud_image(tmp_path: Path, ext4: Path) -> None:
    disk = make_disk(tmp_path / "disk", CLOUD, {20: ext4, 2: ext4})
    found = choose(disk)
    assert found.partition is not None
    assert (found.partition.number, found.partition.offset_bytes, found.partition.name) == (1, 20 * MIB, "root")
    assert found.table is not None
    assert found.table.kind == "gpt"
    # The user's word goes first.
    other = choose(disk, 3).partition
    assert other is not None
    assert other.offset_bytes == 2 * MIB


def test_two_partitions_that_may_be_the_root_are_listed(tmp_path: Path, ext4: Path) -> None:
    script = "label: gpt\nstart=1MiB, size=8MiB, type=linux\nstart=20MiB, size=8MiB, type=linux, name=second\n"
    disk = make_disk(tmp_path / "disk", script, {1: ext4, 20: ext4})
    with pytest.raises(ConfigError, match="disk has 2 partitions that may be the root") as caught:
        choose(disk)
    assert caught.value.details == "1: 8 MiB, Linux, ext4 system\n2: 8 MiB, Linux, second ext4 system"
    assert caught.value.hint == "choose one: --partition N"
    with pytest.raises(ConfigError, match="disk has no partition 3"):
        choose(disk, 3)


def test_one_file_system_among_others_is_the_root(tmp_path: Path, ext4: Path) -> None:
    script = "label: dos\nstart=1MiB, size=8MiB, type=82\nstart=20MiB, size=8MiB, type=83\n"
    disk = make_disk(tmp_path / "disk", script, {20: ext4})
    found = choose(disk)
    assert found.partition is not None
    assert (found.partition.number, found.partition.what) == (2, "Linux")
    with pytest.raises(ConfigError, match="partition 1 of disk holds no file system that vmkit knows"):
        choose(disk, 1)


def test_logical_partition_has_the_number_that_linux_gives_it(tmp_path: Path, ext4: Path) -> None:
    script = "label: dos\nstart=1MiB, size=2MiB, type=83\nstart=4MiB, size=50MiB, type=5\n"
    script += "start=5MiB, size=8MiB, type=82\nstart=20MiB, size=8MiB, type=83\n"
    disk = make_disk(tmp_path / "disk", script, {20: ext4})
    with HostFile(disk) as file:
        table = read_table(file.read, file.size_bytes)
    assert table is not None
    assert [partition.number for partition in table.partitions] == [1, 5, 6]
    found = choose(disk)
    assert found.partition is not None
    assert (found.partition.number, found.partition.offset_bytes) == (6, 20 * MIB)


def test_loop_of_logical_partitions_ends_in_an_error(tmp_path: Path, ext4: Path) -> None:
    script = (
        "label: dos\nstart=4MiB, size=50MiB, type=5\nstart=5MiB, size=8MiB, type=82\nstart=20MiB, size=8MiB, type=83\n"
    )
    disk = make_disk(tmp_path / "disk", script, {20: ext4})
    with disk.open("r+b") as file:
        file.seek(4 * MIB + 446 + 16)
        file.write(b"\0\0\0\0\x05\0\0\0" + struct.pack("<II", 0, 0))
        # The second record is the one that leads on.
        file.seek(4 * MIB + 446 + 16)
        file.write(b"\0\0\0\0\x05\0\0\0" + struct.pack("<II", 1, 9))
        file.seek(4 * MIB + 512)
        file.write(bytes(446 + 16) + b"\0\0\0\0\x05\0\0\0" + struct.pack("<II", 1, 9) + bytes(32) + b"\x55\xaa")
    with pytest.raises(BuildError, match="has no end"):
        choose(disk)


def test_backup_is_read_where_the_primary_table_is_broken(tmp_path: Path, ext4: Path) -> None:
    disk = make_disk(tmp_path / "disk", CLOUD, {20: ext4})
    with disk.open("r+b") as file:
        file.seek(512 + 40)
        file.write(b"\xff")
    found = choose(disk)
    assert found.partition is not None
    assert found.partition.number == 1
    assert found.notes == ("the primary partition table is broken, and its backup is used",)
    with disk.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff" * 4)
        file.seek(-512 + 16, 2)
        file.write(b"\xff" * 4)
    with pytest.raises(BuildError, match=r"the partition table \(GPT\) is broken, and so is its backup"):
        choose(disk)


def test_what_a_disk_was_before_does_not_count(tmp_path: Path, ext4: Path) -> None:
    """sfdisk leaves a btrfs's superblock where it was, behind its table."""
    before = make_file_system("btrfs", tmp_path / "btrfs")
    disk = make_disk(tmp_path / "disk", CLOUD, {0: before}, size=160 * MIB)
    with disk.open("r+b") as file:
        stale = file.read(MIB)
    disk = make_disk(tmp_path / "new", CLOUD, {20: ext4})
    with disk.open("r+b") as file:
        file.seek(64 << 10)
        file.write(stale[64 << 10 :])
    found = choose(disk)
    assert found.partition is not None
    assert found.file_system.kind is FileSystemKind.EXT4


def test_disk_whose_end_is_missing_is_told(tmp_path: Path, ext4: Path) -> None:
    disk = make_disk(tmp_path / "disk", CLOUD, {20: ext4})
    with disk.open("r+b") as file:
        file.truncate(24 * MIB)
    with pytest.raises(BuildError, match=f"partition 1 ends at byte {28 * MIB}, and the disk has {24 * MIB}"):
        choose(disk)


@pytest.mark.parametrize(
    ("at", "magic", "seen"),
    [
        (0, b"LUKS\xba\xbe", r"disk holds an encrypted volume \(LUKS\), and no root"),
        (0x8001, b"CD001", "disk holds a CD's file system"),
        (0, b"hello", "vmkit cannot tell what disk is"),
    ],
)
def test_disk_without_a_root_says_what_it_holds(tmp_path: Path, at: int, magic: bytes, seen: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(at) + magic + bytes(MIB))
    with pytest.raises(ConfigError, match=seen) as caught:
        choose(path)
    assert caught.value.hint
