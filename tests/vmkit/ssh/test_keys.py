"""The keys of a machine's name: made once, renewed when damaged, removed on request; one process at a time."""

import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import Vmkit
from vmkit.errors import ConfigError, HostError
from vmkit.ssh.keys import find_folder, hold_folder, make_keys, remove_keys, write_file

FILES = ("key", "key.pub", "host_key", "host_key.pub")
needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


def make(folder: Path) -> dict[str, bytes]:
    with hold_folder(folder):
        make_keys(folder, "m")
    return {name: (folder / name).read_bytes() for name in FILES}


@needs_keygen
def test_keys_are_made_once_and_closed_to_others(folders: Path) -> None:
    before = os.umask(0)
    try:
        first = make(find_folder("m"))
    finally:
        os.umask(before)
    folder = folders / "state" / ".ssh" / "m"
    assert make(folder) == first
    assert {path.name: path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {"m": 0o700, ".ssh": 0o700}
    for name in ("key", "host_key", "lock"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert first["key"] != make(find_folder("other"))["key"]


@needs_keygen
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", [b"", b"garbage\n", None], ids=["empty", "garbage", "gone"])
def test_damaged_key_is_renewed_and_the_other_stays(folders: Path, name: str, text: bytes | None) -> None:
    folder = find_folder("m")
    first = make(folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_bytes(text)
    second = make(folder)
    stem = name.removesuffix(".pub")
    assert second[stem] != first[stem]
    other = "host_key" if stem == "key" else "key"
    assert second[other] == first[other]
    assert make(folder) == second


@needs_keygen
def test_key_that_others_can_read_is_closed_again(folders: Path) -> None:
    """ssh would refuse it."""
    folder = find_folder("m")
    first = make(folder)
    (folder / "key").chmod(0o644)
    assert make(folder) == first
    assert (folder / "key").stat().st_mode & 0o777 == 0o600


@needs_keygen
def test_two_at_once_get_the_same_keys(folders: Path) -> None:
    found: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: found.append(make(find_folder("m")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert all(keys == found[0] for keys in found)


def test_folder_that_is_open_to_others_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = find_folder("m")
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    folder.chmod(0o755)
    with pytest.raises(HostError, match="must be a folder of your own with mode 0700") as caught, hold_folder(folder):
        pass
    assert caught.value.hint == f"chmod 700 {folder}, or remove it"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(HostError, match="must be a folder of your own"), hold_folder(folder):
        pass


def test_file_in_the_folders_way_is_reported(folders: Path) -> None:
    (folders / "state" / ".ssh").write_text("in the way")
    with pytest.raises(HostError, match="ssh"), hold_folder(find_folder("m")):
        pass


def test_folder_that_is_held_is_waited_for_until_the_deadline(folders: Path) -> None:
    folder = find_folder("m")
    refused = pytest.raises(HostError, match="another vmkit still holds")
    with hold_folder(folder), refused, hold_folder(folder, deadline_s=0.05):
        pass
    with hold_folder(folder, deadline_s=0):
        pass


def test_waiter_gets_a_new_folder_when_the_old_one_was_removed(folders: Path) -> None:
    """The lock of a removed folder protects nothing."""
    folder = find_folder("m")
    with hold_folder(folder):
        waiting = threading.Thread(target=_hold_and_write, args=(folder,))
        waiting.start()
        folder.rename(folder.with_name(".gone"))
    waiting.join(60)
    assert (folder / "known_hosts").read_text() == "x"
    with (folder / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_makers_and_removers_at_once_disturb_each_other_in_nothing(folders: Path) -> None:
    folder = find_folder("m")
    errors: list[Exception] = []

    def make_and_remove() -> None:
        try:
            for _ in range(50):
                with hold_folder(folder):
                    write_file(folder / "known_hosts", "x")
                remove_keys(folder)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make_and_remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(folder.parent.iterdir()) == []


@needs_keygen
def test_removed_keys_leave_nothing_behind(folders: Path) -> None:
    folder = find_folder("m")
    first = make(folder)
    (folder / ".key").write_text("of a process that was killed")
    assert remove_keys(folder)
    assert not folder.exists()
    assert not remove_keys(folder)
    assert make(folder)["key"] != first["key"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", ".ssh"])
def test_name_that_no_machine_can_have_has_no_folder(folders: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a machine's name"):
        find_folder(name)


def test_equal_file_stays_as_it_is(tmp_path: Path) -> None:
    """A mark compares the file's times: another user's exchange must not make it stale."""
    path = tmp_path / "f"
    write_file(path, "one")
    before = path.stat()
    write_file(path, "one")
    assert path.stat() == before
    write_file(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    with pytest.raises(HostError, match="cannot write"):
        write_file(tmp_path / "missing" / "f", "x")


@needs_keygen
def test_verb_forgets_keys_of_a_machine_that_is_gone(vmkit: Vmkit, folders: Path) -> None:
    make(find_folder("m"))
    done = vmkit("ssh", "--forget-keys", "m")
    assert (done.status, done.out) == (0, "the ssh keys of m are removed\n")
    assert not find_folder("m").exists()
    done = vmkit("ssh", "--forget-keys", "m")
    assert done.status == 1
    assert "there are no ssh keys of 'm'" in done.err
    assert vmkit("ssh", "--forget-keys", "../m").status != 0
    assert vmkit("ssh", "--forget-keys", "m", "true").status == 64


def _hold_and_write(folder: Path) -> None:
    with hold_folder(folder):
        write_file(folder / "known_hosts", "x")
