"""Debian by mmdebstrap: what it is asked for, what is taken of its answer, and every way it cannot be had."""

import io
import os
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import BuildError, HostError, VmkitError
from vmkit.image.debian.apt import PackageRecord
from vmkit.image.debian.bootstrap import bootstrap, read_root
from vmkit.image.debian.packages import Lock, hash_file
from vmkit.image.formats.tree import FileKind, Tree

MakeDeb = Callable[..., Path]


def make_root(path: Path) -> None:
    """What an installation's tar holds, in small."""
    with tarfile.open(path, "w") as tar:
        for name, kind, mode, extra in (
            ("./", tarfile.DIRTYPE, 0o755, {}),
            ("./bin", tarfile.SYMTYPE, 0o777, {"linkname": "usr/bin"}),
            ("./usr/bin/", tarfile.DIRTYPE, 0o755, {}),
            ("./usr/bin/passwd", tarfile.REGTYPE, 0o4755, {"gid": 42}),
            ("./usr/bin/again", tarfile.LNKTYPE, 0o4755, {"linkname": "./usr/bin/passwd"}),
            ("./dev/null", tarfile.CHRTYPE, 0o666, {}),
            ("./etc/resolv.conf", tarfile.REGTYPE, 0o644, {}),
            ("./etc/hostname", tarfile.REGTYPE, 0o644, {}),
            ("./etc/apt/sources.list", tarfile.REGTYPE, 0o644, {}),
            ("./var/lib/apt/lists/partial", tarfile.DIRTYPE, 0o700, {"uid": 42}),
            ("./var/lib/dpkg/status", tarfile.REGTYPE, 0o644, {}),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = kind, mode, 1_700_000_000
            data = b"data" if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            for field, value in extra.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))


def test_root_is_read_without_the_host_s_files_and_devices(tmp_path: Path) -> None:
    make_root(tmp_path / "root.tar")
    tree = Tree()
    read_root(tmp_path / "root.tar", tree)
    paths = {path for path, node in tree.walk() if node.kind is FileKind.FILE}
    assert paths == {"usr/bin/passwd", "usr/bin/again", "var/lib/dpkg/status"}
    node = tree.find("usr/bin/passwd")
    assert node is not None
    partial = tree.find("var/lib/apt/lists/partial")
    assert partial is not None
    assert partial.uid == 0
    assert (node.mode, node.gid, node.data, node.mtime_s) == (0o4755, 42, b"data", 1_700_000_000)


def test_damaged_root_is_told(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(b"x" * 2000)
    with pytest.raises(BuildError, match="cannot read what mmdebstrap has written"):
        read_root(tmp_path / "root.tar", Tree())


@pytest.fixture
def lock(make_deb: MakeDeb) -> tuple[Lock, dict[str, Path]]:
    debs = {name: make_deb(name) for name in ("base", "tool")}
    records = tuple(
        PackageRecord(name, "1.0-1", "amd64", deb.stat().st_size, hash_file(deb), "", "") for name, deb in debs.items()
    )
    return Lock("stable", "", "stable", "", ("base", "tool"), records), debs


@pytest.fixture
def fake_mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """fake_mmdebstrap(shell) puts a script of that name before all others on PATH; it gives the log of its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "words"

    def write(script: str) -> Path:
        text = f'#!/bin/sh\nprintf "%s\\n" "epoch=$SOURCE_DATE_EPOCH" "$@" > {shlex.quote(str(log))}\n{script}\n'
        (folder / "mmdebstrap").write_text(text)
        (folder / "mmdebstrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        # The program is given a PATH of its own: there it is found through the one that looks.
        monkeypatch.setattr("vmkit.image.debian.bootstrap.PATH", f"{folder}:/usr/bin:/bin")
        return log

    return write


def test_mmdebstrap_is_given_these_packages_and_no_others(
    tmp_path: Path, lock: tuple[Lock, dict[str, Path]], fake_mmdebstrap: Callable[[str], Path]
) -> None:
    make_root(tmp_path / "answer.tar")
    answer = shlex.quote(str(tmp_path / "answer.tar"))
    log = fake_mmdebstrap(f'for word; do case $word in */root.tar) cp {answer} "$word";; esac; done')
    work = tmp_path / "work"
    work.mkdir()
    tree = Tree()
    bootstrap(tree, *lock, work)
    assert tree.find("var/lib/dpkg/status") is not None
    words = log.read_text().splitlines()
    assert "--include=base,tool" in words
    assert "stable" in words
    assert int(words[0].removeprefix("epoch=")) > 1_000_000_000
    index = (work / "Packages").read_text()
    assert index.count("Package: ") == 2
    assert f"SHA256: {lock[0].find('tool').sha256}" in index
    assert (work / "tool.deb").is_file()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'E: unable to pick chroot mode automatically' >&2; exit 1", HostError, "it needs root, or user namesp"),
        ("echo 'E: apt-get failed' >&2; exit 25", BuildError, "mmdebstrap cannot install the packages"),
    ],
)
def test_mmdebstrap_s_failure_is_told(
    tmp_path: Path,
    lock: tuple[Lock, dict[str, Path]],
    fake_mmdebstrap: Callable[[str], Path],
    script: str,
    kind: type[VmkitError],
    message: str,
) -> None:
    fake_mmdebstrap(script)
    with pytest.raises(kind, match=message) as caught:
        bootstrap(Tree(), *lock, tmp_path)
    assert "E: " in caught.value.details


def test_missing_mmdebstrap_is_told(
    tmp_path: Path, lock: tuple[Lock, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmkit.image.debian.bootstrap.PATH", str(tmp_path))
    with pytest.raises(HostError, match="cannot find the program 'mmdebstrap'") as caught:
        bootstrap(Tree(), *lock, tmp_path)
    assert "apt-get install mmdebstrap" in caught.value.hint
