"""Files in and out of a guest by Client.push and Client.pull, and what a lying guest can do with them: nothing."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vsh.live import Vshd
from vsh.address import Address
from vsh.archive import SHOWN_BYTES, _unpack, pull, push
from vsh.client import Client
from vsh.errors import UsageError, VshError
from vsh.process import Process


@pytest.fixture
def client(vshd: Vshd) -> Client:
    return Client(Address.unix(str(vshd.path)))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with a file, an empty directory, an executable, a link and a hard link."""
    root = tmp_path / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "file").write_bytes(b"data")
    (root / "sub" / "run").write_bytes(b"#!/bin/sh\n")
    (root / "sub" / "run").chmod(0o755)
    (root / "link").symlink_to("sub/run")
    os.link(root / "file", root / "same")
    return root


def list_tree(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = (path.stat().st_mode & 0o777, path.read_bytes() if path.is_file() else None)
    return found


def test_push_and_pull_bring_a_tree_back(client: Client, tree: Path, tmp_path: Path) -> None:
    client.push(tree, tmp_path / "there")
    client.pull(str(tmp_path / "there"), str(tmp_path / "back"))
    assert list_tree(tmp_path / "back") == list_tree(tree)
    assert (tmp_path / "back/file").stat().st_ino == (tmp_path / "back/same").stat().st_ino


def test_push_replaces_a_file(client: Client, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    client.push(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "old").read_text() == "new"


def test_exists_sees_links_without_a_target(client: Client, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    assert client.exists(str(tmp_path / "dangling"))
    assert not client.exists(str(tmp_path / "nowhere"))


def test_push_of_a_missing_source_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        client.push(str(tmp_path / "no"), "/tmp/x")


def test_push_into_a_missing_directory_prints_the_guests_reason(client: Client, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(VshError, match="cannot push") as caught:
        client.push(str(tree), str(tmp_path / "no/such/place"))
    assert "No such file" in caught.value.details


def test_pull_of_a_missing_source_leaves_the_old_copy(client: Client, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(VshError, match="cannot pull"):
        client.pull(str(tmp_path / "no"), str(tmp_path / "kept"))
    assert (tmp_path / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("path", ["/", "", ".", "/tmp/.."])
def test_guest_path_must_end_in_a_name(client: Client, path: str) -> None:
    with pytest.raises(UsageError, match="must end in a name"):
        client.pull(path, "/tmp/x")


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, target, mode
    return made


Make = Callable[[tarfile.TarFile], None]


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member("/etc/evil")],
        [member("other")],
        [member("copy/../../evil")],
        [member("copy", tarfile.SYMTYPE, "/tmp"), member("copy/evil")],
        [member("copy", tarfile.DIRTYPE), member("copy/l", tarfile.SYMTYPE, "/tmp"), member("copy/l/evil")],
        [member("copy", tarfile.DIRTYPE), member("copy/l", tarfile.LNKTYPE, "/etc/passwd")],
        [member("copy", tarfile.DIRTYPE), member("copy/l", tarfile.LNKTYPE, "copy/../../x")],
        [
            member("copy", tarfile.DIRTYPE),
            member("copy/s", tarfile.SYMTYPE, "/etc"),
            member("copy/l", tarfile.LNKTYPE, "copy/s/passwd"),
        ],
    ],
    ids=lambda members: "+".join(f"{m.name}>{m.linkname}" for m in members),
)
def test_guest_that_lies_writes_nothing_outside(tmp_path: Path, members: list[tarfile.TarInfo]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|") as tar:
        for one in members:
            tar.addfile(one, io.BytesIO())
    stream.seek(0)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(VshError, match="the guest sent"):
        _unpack(stream, str(work), "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert not any("evil" in path.name for path in work.rglob("*"))


def test_modes_of_a_guest_lose_setuid_and_devices_are_left_out(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|") as tar:
        tar.addfile(member("copy", tarfile.DIRTYPE, mode=0o7777))
        tar.addfile(member("copy/suid", mode=0o6755), io.BytesIO())
        tar.addfile(member("copy/null", tarfile.CHRTYPE))
    stream.seek(0)
    assert _unpack(stream, str(tmp_path), "copy") == 0o777
    assert (tmp_path / "copy/suid").stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "copy/null").exists()


class OtherTar:
    """Instead of the guest's tar, this script."""

    def __init__(self, client: Client, script: str) -> None:
        self.client = client
        self.script = script

    def popen(self, _argv: list[str], *, stdin: int, stdout: int, user: str) -> Process[bytes]:
        return self.client.popen(["sh", "-c", self.script], stdin=stdin, stdout=stdout, user=user)


# More than all buffers on the way hold.
COMPLAIN = "head -c 8000000 /dev/zero | tr '\\0' e >&2"


@pytest.mark.parametrize("way", ["push", "pull"])
def test_guest_that_complains_a_lot_does_not_stall(client: Client, tree: Path, tmp_path: Path, way: str) -> None:
    (tree / "large").write_bytes(bytes(8 << 20))
    with pytest.raises(VshError, match=f"cannot {way}") as caught:
        if way == "push":
            push(OtherTar(client, f"{COMPLAIN}; exit 2"), str(tree), "/tmp/x")
        else:
            pull(OtherTar(client, f"{COMPLAIN}; exit 2"), "/tmp/x", str(tmp_path / "x"))
    assert caught.value.details == "e" * SHOWN_BYTES


def test_guest_that_pads_its_archive_for_ever_is_cut_off(client: Client, tmp_path: Path) -> None:
    with pytest.raises(VshError, match="sent no such file"):
        pull(OtherTar(client, "exec cat /dev/zero"), "/tmp/x", str(tmp_path / "x"))
    assert list(tmp_path.glob(".vsh-pull-*")) == []


def test_broken_archive_of_a_tar_that_worked_is_called_broken(client: Client, tmp_path: Path) -> None:
    with pytest.raises(VshError, match="broken archive"):
        pull(OtherTar(client, "echo no tar"), "/tmp/x", str(tmp_path / "x"))
    assert list(tmp_path.glob(".vsh-pull-*")) == []


def test_pull_of_a_directory_that_is_read_only(client: Client, tmp_path: Path) -> None:
    """A directory is moved while it may be written to; only root could do it afterwards."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("x")
    there.chmod(0o555)
    client.pull(str(there), str(tmp_path / "back"))
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o555
    assert (tmp_path / "back/file").read_text() == "x"


def test_push_of_a_file_that_is_shorter_than_its_size_is_an_error(client: Client, tmp_path: Path) -> None:
    """As a file that is written anew meanwhile; this one of the kernel's always is."""
    with pytest.raises(VshError, match="cannot push /sys/kernel/uevent_seqnum: unexpected end of data"):
        client.push("/sys/kernel/uevent_seqnum", str(tmp_path / "there"))
