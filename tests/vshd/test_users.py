"""The reading of passwd and group: what the C library finds in this system's files, and what odd files hold."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from tests.vsh.live import StartVshd
from vshd.session import users

LONG = b"long:x:5:5::/" + b"h" * 100_000 + b":/bin/sh"


def of_files(name: str) -> bool:
    """Whether the file has a user: the C library may know others."""
    return any(line.startswith(f"{name}:") for line in Path(users.PASSWD).read_text().splitlines())


def test_users_of_this_system_are_those_that_the_c_library_finds() -> None:
    entries = [entry for entry in pwd.getpwall() if of_files(entry.pw_name)]
    assert entries
    for entry in entries:
        found = users.find_user(entry.pw_name.encode())
        assert found is not None
        assert (found.uid, found.gid, found.home.decode(), found.shell.decode()) == (
            *(entry.pw_uid, entry.pw_gid),
            *(entry.pw_dir, entry.pw_shell),
        )
        by_number = users.find_uid(entry.pw_uid)
        assert by_number is not None
        assert by_number.name.decode() == pwd.getpwuid(entry.pw_uid).pw_name
        assert set(users.list_groups(found.name, found.gid)) == set(os.getgrouplist(entry.pw_name, entry.pw_gid))


def test_groups_of_this_system_are_those_that_the_c_library_finds() -> None:
    for entry in grp.getgrall():
        found = users.find_group(entry.gr_name.encode())
        assert found is not None
        assert (found.gid, found.members) == (entry.gr_gid, [name.encode() for name in entry.gr_mem])


@pytest.mark.parametrize(
    ("data", "name", "uid"),
    [
        (b"root:x:0:0:root:/root:/bin/sh\nann:x:7:7::/home/ann:/bin/ash\n", b"ann", 7),
        (b"ann:x:7:7::/home/ann:/bin/ash", b"ann", 7),
        (b"\n\nann:x:7:7\n", b"ann", 7),
        (b"ann:x:7:7::/:\nann:x:0:0::/:\n", b"ann", 7),
        (b"joann:x:8:8::/:\nann:x:7:7::/:\n", b"ann", 7),
        (b"a:b:ann:7:7::/:\nann:x:9:9::/:\n", b"ann", 9),
        (b"%s\nann:x:7:7::/:\n" % LONG, b"ann", 7),
        # What breaks the form is no line, and the next one counts.
        (b"ann\nann:x\nann:x:7\nann:x:-1:7::/:\nann:x:+1:7::/:\nann:x: 1:7::/:\nann:x:1_0:7::/:\n", b"ann", None),
        (b"ann:x:4294967295:7::/:\n", b"ann", None),
        (b"ann:x:4294967294:7::/:\n", b"ann", 4294967294),
        (b"ann:x:" + b"9" * 5000 + b":7::/:\n", b"ann", None),
        (b"ann:x:00:0::/:\n", b"ann", None),
        (b"ann:x::0::/:\n", b"ann", None),
        (b"ann:x:0:0:\0:/:\n", b"ann", None),
        (b"#ann:x:7:7::/:\n+ann:x:8:8::/:\n-ann:x:8:8::/:\n+::::::\n", b"ann", None),
        # No name reaches across the end of a line or of a field.
        (b"x\nroot:x:0:0::/:\n", b"x\nroot", None),
        (b"ann:x:0:0::/:\n", b"ann:x", None),
        (b":x:0:0::/:\n::0:0::/:\n", b"", None),
        (b"+:x:0:0::/:\n", b"+", None),
        (b"", b"root", None),
        (b"\xff\xfe:x:7:7:\xff:/\xff:/bin/sh\n", b"\xff\xfe", 7),
    ],
)
def test_user_is_found_by_name_in_a_file_of_this_kind(data: bytes, name: bytes, uid: int | None) -> None:
    found = users.find_user_in(data, name)
    assert (None if found is None else found.uid) == uid
    if found is not None:
        again = users.find_uid_in(data, found.uid)
        assert again is not None
        assert again.uid == found.uid


def test_number_is_that_of_the_user_and_of_no_other_field() -> None:
    data = b"a:7:1:2:7:/:\nb:x:2:7:7:/:\nc:x:7:3::/:\nd:x:7:4::/:\n"
    found = users.find_uid_in(data, 7)
    assert found is not None
    assert (found.name, found.gid) == (b"c", 3)


def test_groups_are_those_that_list_the_name() -> None:
    data = b"a:x:1:ann\nb:x:2:bob,ann\nc:x:3:annabel\nann:x:4:\nd:x:5:ann,ann\ne:x:1:ann\nf:x:+6:ann\ng:ann:7:bob\n"
    assert users.list_groups_in(data, b"ann", 10) == [10, 1, 2, 5]
    assert users.list_groups_in(b"", b"ann", 10) == [10]
    assert users.list_groups_in(data, b"bob,ann", 10) == [10]


def test_more_groups_than_the_kernel_takes_are_left_out() -> None:
    data = b"".join(b"g:x:%d:ann\n" % gid for gid in range(users.GROUPS_MAX + 10))
    assert len(users.list_groups_in(data, b"ann", 0)) == users.GROUPS_MAX


def test_file_that_is_none_has_no_users(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(link)
    for path in (tmp_path / "none", fifo, link, tmp_path, Path("/dev/zero")):
        assert users.read_file(str(path)) == b""


def test_file_that_has_no_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    path.write_bytes(b"ann:x:7:7::/:\n")
    os.truncate(path, users.FILE_MAX + 1)
    with pytest.raises(OSError, match="File too large"):
        users.read_file(str(path))
    os.truncate(path, users.FILE_MAX)
    assert len(users.read_file(str(path))) == users.FILE_MAX


@pytest.mark.root
def test_vshd_never_loads_the_c_librarys_sources_of_users(start_vshd: StartVshd) -> None:
    """A session's process has mapped no library for users: it would be the one of a root that it has entered."""
    vshd = start_vshd("--spare_time=5")
    with vshd.start("--user=root", "--", "sh", "-c", "cat /proc/$PPID/maps") as running:
        maps = running.communicate(timeout=30)[0]
    assert b"python" in maps
    assert b"libnss" not in maps
