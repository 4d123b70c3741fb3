"""Folders of the user's own: those that others can write to are refused, with what to do."""

import grp
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vshd.test_init import needs_namespace
from vmkit.errors import HostError
from vmkit.image.cache import open_cache
from vmkit.machine.registry import find_state_directory
from vmkit.state import check_own_folder, find_state_folder

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir(mode=0o700)
    return path


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o757])
def test_folder_that_others_can_write_to_is_refused(folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(mode)
    text = rf"other users can write to the cache folder {folder} \(mode {mode:04o}, uid {os.geteuid()}\)"
    with pytest.raises(HostError, match=text) as caught, open_cache(folder):
        pass
    assert caught.value.hint == (
        f"if you trust what is in it: chmod go-w {folder}; or name another: VMKIT_CACHE_DIR=DIR"
    )
    monkeypatch.setenv("VMKIT_STATE_DIR", str(folder))
    for find in (find_state_folder, find_state_directory):
        with pytest.raises(HostError, match="other users can write to the state folder"):
            find()


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500, 0o711])
def test_folder_that_others_can_only_read_is_accepted(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    check_own_folder(folder, "cache", "VMKIT_CACHE_DIR")


def test_folder_of_the_users_own_group_is_accepted(folder: Path) -> None:
    """Debian gives each user a group, and some systems a umask of 002 with it."""
    own = grp.getgrgid(folder.stat().st_gid)
    if own.gr_name != pwd.getpwuid(os.geteuid()).pw_name or own.gr_mem:
        pytest.skip("this user has no group of their own")
    folder.chmod(0o775)
    check_own_folder(folder, "cache", "VMKIT_CACHE_DIR")


@pytest.mark.root
@pytest.mark.parametrize("gid", [NOBODY, 4_000_000_000])
def test_folder_of_another_group_is_refused(folder: Path, gid: int) -> None:
    os.chown(folder, 0, gid)
    folder.chmod(0o770)
    with pytest.raises(HostError, match=r"other users can write .* \(mode 0770, uid 0\)"):
        check_own_folder(folder, "cache", "VMKIT_CACHE_DIR")


@pytest.mark.root
def test_state_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root would follow that user's links when it writes logs there."""
    os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("VMKIT_STATE_DIR", str(folder))
    with pytest.raises(HostError, match=r"the state folder .* belongs to another user \(uid 65534\)") as caught:
        find_state_folder()
    assert "VMKIT_STATE_DIR" in caught.value.hint


def test_folder_that_is_not_there_yet_is_no_trouble(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_STATE_DIR", str(folder / "later"))
    assert find_state_folder() == folder / "later"


def test_folder_that_cannot_be_read_is_an_error(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(HostError, match=r"cannot read the cache folder .*: Not a directory"):
        check_own_folder(folder / "file" / "cache", "cache", "VMKIT_CACHE_DIR")


CHECK = """
import grp, os, pwd, sys
from pathlib import Path
from vmkit.errors import HostError
from vmkit.state import check_own_folder
uid = int(sys.argv[1])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
try:
    check_own_folder(Path(sys.argv[2]), "cache", "VMKIT_CACHE_DIR")
except HostError as error:
    print(error.brief, error.hint, sep="\\n")
"""


def check_as(uid: int, folder: Path, *wrapper: str) -> list[str]:
    """The error's lines for a user whose only group has the same number."""
    command = [*wrapper, sys.executable, "-c", CHECK, str(uid), str(folder)]
    environment = {**os.environ, "HOME": "/nonexistent"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def above() -> Iterator[Path]:
    """A folder in /tmp, which is root's and sticky, as the tests' own is not for other users."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        folder = Path(path)
        (folder / "vmkit").mkdir(mode=0o700)
        os.chown(folder / "vmkit", 1, 1)
        folder.chmod(0o755)
        yield folder


@pytest.mark.root
@pytest.mark.parametrize(("mode", "owner"), [(0o755, 0), (0o1777, 0), (0o711, 1), (0o1775, 0)])
def test_folder_above_that_keeps_names_is_accepted(above: Path, mode: int, owner: int) -> None:
    os.chown(above, owner, 0)
    above.chmod(mode)
    assert check_as(1, above / "vmkit") == []


@pytest.mark.root
@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o775, 0), (0o755, NOBODY), (0o1777, NOBODY)])
@pytest.mark.parametrize("name", ["vmkit", "later/vmkit"])
def test_folder_above_in_which_others_can_rename_is_refused(above: Path, mode: int, owner: int, name: str) -> None:
    os.chown(above, owner, 0)
    above.chmod(mode)
    remedy = "" if owner else f"if you trust what is in it: chmod go-w {above}; or "
    assert check_as(1, above / name) == [
        f"other users can write to {above}, above the cache folder (mode {mode:04o}, uid {owner})",
        f"{remedy}name another: VMKIT_CACHE_DIR=DIR",
    ]


@pytest.mark.root
def test_folder_behind_a_link_is_checked_where_it_is(above: Path) -> None:
    above.chmod(0o777)
    link = above.with_name(f"{above.name}.link")
    link.symlink_to(above / "vmkit")
    try:
        assert f"other users can write to {above}, above" in check_as(1, link)[0]
    finally:
        link.unlink()


@pytest.mark.root
@needs_namespace
def test_root_of_a_container_may_keep_it_below_an_open_folder(folder: Path) -> None:
    """GitLab's runner makes /builds, and the project's folder below it, with mode 0777."""
    folder.parent.chmod(0o777)
    assert check_as(0, folder, "unshare", "--pid", "--fork") == []
