"""A tar becomes nodes; a damaged or hostile one becomes an error that a person can read, and takes no memory."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats.tar import read_tar
from vmkit.image.formats.tree import FileKind, Node


def make_member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> bytes:
    """One member with its header, in GNU's format."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + padding


END = bytes(2 * tarfile.BLOCKSIZE)


def read(*members: bytes, end: bytes = END, keep_time: bool = False) -> dict[str, Node]:
    return dict(read_tar(io.BytesIO(b"".join(members) + end), keep_time=keep_time))


def test_members_become_nodes_with_normal_paths() -> None:
    nodes = read(
        make_member("./bin/", tarfile.DIRTYPE, mode=0o2755, uid=1),
        make_member("./bin/a", data=b"content", mode=0o4755, gid=7, mtime=9),
        make_member("bin/b", tarfile.SYMTYPE, linkname="a"),
        make_member("bin/c", tarfile.LNKTYPE, linkname="./bin/a"),
        make_member("bin/d", tarfile.LNKTYPE, linkname="bin/c", mode=0o600),
        make_member("dev/null", tarfile.CHRTYPE),
        make_member("run/fifo", tarfile.FIFOTYPE),
        make_member("long/" + "x" * 300, data=b"1"),
        keep_time=True,
    )
    assert nodes.pop("bin") == Node(FileKind.DIRECTORY, 0o2755, uid=1, mtime_s=0)
    assert nodes.pop("usr/bin/a") == Node(FileKind.FILE, 0o4755, b"content", gid=7, mtime_s=9)
    assert (nodes["usr/bin/b"].data, nodes["usr/bin/c"].data, nodes["usr/bin/d"].data) == (b"a", b"content", b"content")
    assert nodes["usr/bin/d"].mode == 0o600
    assert set(nodes) == {"usr/bin/b", "usr/bin/c", "usr/bin/d", "long/" + "x" * 300}


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (make_member("a", tarfile.LNKTYPE, linkname="gone"), "hard link to 'gone', which is not before it"),
        (make_member("a", tarfile.LNKTYPE, linkname="a"), "hard link to 'a', which is not before it"),
        (make_member("a\udcff"), r"a name that is not UTF-8 text: 'a\\udcff'"),
        (make_member("a", tarfile.SYMTYPE, linkname="\udcff"), "a name that is not UTF-8 text"),
        (make_member("a", tarfile.SYMTYPE, linkname=""), "has a target of 0 bytes"),
        (make_member("a", tarfile.SYMTYPE, linkname="x" * 5000), "has a target of 5000 bytes"),
        (make_member("a", uid=-1), "an owner or a time that no file has: -1"),
        (make_member("a", gid=1 << 32), "an owner or a time that no file has"),
        (make_member("a", mtime=1 << 33), "an owner or a time that no file has"),
        (make_member("../a"), "leaves the guest's file tree"),
        (make_member("a", size=1 << 40), "holds more than 1024 MiB at 'a'"),
        (make_member("a", size=10_000), "damaged: unexpected end of data"),
        (make_member("a", data=b"x")[:-100], "damaged: "),
        (b"x" * 512, "damaged: "),
        (make_member("a", tarfile.GNUTYPE_LONGNAME, size=1 << 30), "a header claims 1073741824 bytes"),
        (make_member("a", tarfile.XHDTYPE, size=1 << 30), "a header claims 1073741824 bytes"),
        (make_member("a", tarfile.XHDTYPE, b"14 mtime=nan\n\n") + make_member("b"), "cannot convert float NaN"),
    ],
)
def test_damaged_member_is_named(member: bytes, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        # In the middle, too: tarfile takes a damaged header there for the archive's end.
        read(make_member("before", data=b"x"), member, make_member("after"), keep_time=True)


def test_archive_of_many_files_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmkit.image.formats.tar.TREE_LIMIT_BYTES", 2500)
    assert len(read(*(make_member(name, data=bytes(1000)) for name in "ab"))) == 2
    with pytest.raises(BuildError, match="at 'c'"):
        read(*(make_member(name, data=bytes(1000)) for name in "abc"))


def test_damage_of_any_kind_is_a_build_error() -> None:
    """2,000 archives with a few bytes of headers changed: each is read, or is a BuildError."""
    whole = b"".join(
        (
            make_member("d/", tarfile.DIRTYPE, mode=0o755),
            make_member("d/a", data=b"content" * 100, mode=0o755),
            make_member("d/l", tarfile.LNKTYPE, linkname="d/a"),
            make_member("d/s", tarfile.SYMTYPE, linkname="a"),
            make_member("d/" + "x" * 200, data=b"1"),
        )
    )
    chance = random.Random(1)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(0, len(damaged) // 512) * 512 + chance.randrange(0, 300)
            damaged[at] = chance.choice((0, 0x20, 0x30, 0x37, 0x80, 0xFF, chance.randrange(256)))
        if chance.random() < 0.8:
            _seal(damaged)
        try:
            read(bytes(damaged))
        except BuildError:
            refused += 1
    assert 200 < refused < 2000


def _seal(archive: bytearray) -> None:
    """Makes the checksum of each block that has one right again, so that more than the checksum is tried."""
    for at in range(0, len(archive), 512):
        if archive[at + 257 : at + 262] == b"ustar":
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])


def test_tar_is_read_from_a_pipe(tmp_path: Path) -> None:
    """It is never wound back."""

    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self._data = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed wants any buffer
            return self._data.readinto(memoryview(buffer)[:100])

    archive = make_member("a", data=b"x" * 5000) + make_member("b", tarfile.LNKTYPE, linkname="a") + END
    nodes = dict(read_tar(io.BufferedReader(Pipe(archive))))
    assert nodes["b"].data == b"x" * 5000
