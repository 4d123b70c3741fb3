"""A tar's members by their headers: what tarfile and GNU tar write, and what nobody may make of it."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.vmkit.roots.archives import folder, link, make_tar, member
from vmkit.errors import BuildError
from vmkit.roots.members import MemberKind, TarMember, read_members


def read(data: bytes, *, has_end: bool = True) -> list[TarMember]:
    return list(read_members(lambda at, length: data[at : at + length], name="archive", has_end=has_end))


def content(data: bytes, found: TarMember) -> bytes:
    return data[found.offset : found.offset + found.size_bytes]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_wrote(form: int) -> None:
    long = "d" * 90 + "/" + "f" * 90
    data = make_tar(
        [
            folder("./"),
            folder("./etc/", mode=0o1777, uid=1000, gid=1001, mtime=1_700_000_000),
            ("./etc/file", b"content"),
            (long, b"x" * 1000),
            link("etc/link", "/far/../away"),
            link("etc/hard", "./etc/file", tarfile.LNKTYPE),
            member("dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=1),
            member("pipe", tarfile.FIFOTYPE),
        ],
        form,
    )
    found = read(data)
    assert [(one.path, one.kind) for one in found] == [
        ("", MemberKind.DIRECTORY),
        ("etc", MemberKind.DIRECTORY),
        ("etc/file", MemberKind.FILE),
        (long, MemberKind.FILE),
        ("etc/link", MemberKind.SYMLINK),
        ("etc/hard", MemberKind.HARD_LINK),
        ("dev/sda", MemberKind.BLOCK),
        ("pipe", MemberKind.FIFO),
    ]
    assert (found[1].mode, found[1].uid, found[1].gid, found[1].mtime_s) == (0o1777, 1000, 1001, 1_700_000_000)
    assert (content(data, found[2]), content(data, found[3])) == (b"content", b"x" * 1000)
    assert (found[4].link, found[5].link, found[6].device) == ("/far/../away", "etc/file", (8, 1))


def test_large_numbers_long_names_and_attributes_are_read() -> None:
    capability = b"\x01\x00\x00\x02" + bytes(16)
    fields = {
        "SCHILY.xattr.security.capability": capability.decode("latin-1"),
        "SCHILY.xattr.security.selinux": "label",
        "SCHILY.xattr.user.mine": "x",
        "mtime": "1700000000.75",
    }
    name = "/".join(["d" * 200] * 10)
    data = make_tar([(member(name, uid=3_000_000, pax_headers=fields), b"1")])
    (found,) = read(data)
    assert (found.path, found.uid, found.mtime_s) == (name, 3_000_000, 1_700_000_000)
    assert found.xattrs[1:] == (("user.mine", b"x"),)
    assert found.xattrs[0][0] == "security.capability"
    gnu = make_tar([(member(name, uid=3_000_000_000), b"1")], tarfile.GNU_FORMAT)
    assert [(one.path, one.uid) for one in read(gnu)] == [(name, 3_000_000_000)]


@pytest.mark.parametrize("form", [["--format=gnu"], ["--format=posix"], ["--format=posix", "--sparse-version=0.1"]])
def test_holes_are_those_that_gnu_tar_saw(tmp_path: Path, form: list[str]) -> None:
    path = tmp_path / "root/lastlog"
    path.parent.mkdir()
    with path.open("wb") as file:
        for number in range(30):
            file.seek(number << 20)
            file.write(os.urandom(4096))
        file.truncate(40 << 20)
    words = ["tar", "--sparse", *form, "-C", str(path.parent), "-cf", "-", "lastlog"]
    data = subprocess.run(words, check=True, capture_output=True).stdout
    assert len(data) < 1 << 20
    (found,) = read(data)
    assert (found.path, found.size_bytes) == ("lastlog", 40 << 20)
    assert found.runs is not None
    whole, at = bytearray(found.size_bytes), found.offset
    for place, length in found.runs:
        whole[place : place + length] = data[at : at + length]
        at += length
    assert bytes(whole) == path.read_bytes()


@pytest.mark.parametrize(
    ("pieces", "seen"),
    [
        ([("/etc/passwd", b"x")], "the absolute name '/etc/passwd'"),
        ([("etc/../../passwd", b"x")], "'etc/../../passwd', which leads out of the root"),
        ([("..", b"x")], "which leads out of the root"),
        ([("a", b"x"), link("b", "../../etc/shadow", tarfile.LNKTYPE)], "which leads out of the root"),
        ([("n" * 256, b"x")], "longer than Linux allows"),
        ([("/".join(["n" * 200] * 30), b"x")], "longer than Linux allows"),
        ([("a/" * 300 + "b", b"x")], "more than 256 folders deep"),
        ([(member("a", pax_headers={"path": "a\0b"}), b"x")], "with a NUL byte"),
        ([link("a", "b" * 5000)], "has a target of 5000 bytes"),
        ([member("a", b"Q")], "has the type b'Q', which no file of a root has"),
        ([member("a", pax_headers={"uid": "4294967295"})], "the owner 4294967295, which no file has"),
        ([member("a", pax_headers={"size": "99999999999999999999"})], "a malformed number"),
        ([member("a", pax_headers={"mtime": "soon"})], "a malformed time"),
        ([member("a", pax_headers={"x": "y" * (2 << 20)})], "the extended header at byte 0 is too large"),
        ([member("a", pax_headers={"GNU.sparse.map": "5,1,0,1", "GNU.sparse.size": "9"})], "damaged map of its holes"),
    ],
)
def test_member_that_is_no_file_of_a_root_is_refused(pieces: list[tarfile.TarInfo], seen: str) -> None:
    with pytest.raises(BuildError, match=seen) as caught:
        read(make_tar(pieces))
    assert caught.value.hint


def test_hard_link_may_name_the_path_in_the_guest() -> None:
    found = read(make_tar([("a", b"x"), link("b", "/a", tarfile.LNKTYPE)]))
    assert found[1].link == "a"


def test_archive_that_is_cut_off_is_damaged_wherever_it_is_cut() -> None:
    data = make_tar([("a", b"x" * 600), (member("b" * 120), b"y" * 10)]).rstrip(b"\0")
    whole = data + bytes(-len(data) % 512)
    for length in range(0, len(whole), 37):
        with pytest.raises(BuildError, match="archive is damaged"):
            read(whole[:length])
    # One without an end mark is whole only where a digest says so.
    assert [one.path for one in read(whole, has_end=False)] == ["a", "b" * 120]
    with pytest.raises(BuildError, match=f"it ends at byte {len(whole)}, without an end mark"):
        read(whole)


@pytest.mark.parametrize("at", [0, 124, 148, 156])
def test_header_with_a_wrong_byte_is_damaged(at: int) -> None:
    data = bytearray(make_tar([("abc", b"x")]))
    data[at] ^= 0x15
    with pytest.raises(BuildError, match="has a wrong checksum"):
        read(bytes(data))


def test_extension_headers_in_a_row_have_an_end() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for _ in range(20):
            tar.addfile(member("././@LongLink", b"L", size=3), io.BytesIO(b"ab\0"))
    with pytest.raises(BuildError, match=r"the extended header at byte \d+ is too large"):
        read(out.getvalue())
