"""The folders of stored machines: whole or not there, one name each, and one holder at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.other_user import ask_as_other
from vmkit.errors import HostError, MachineError, NameInUseError
from vmkit.stored.place import find_machines_folder, is_stored, list_names
from vmkit.stored.record import Base, StoredRecord, parse_record, render_record
from vmkit.stored.store import (
    RECORD,
    lock_stored,
    make_stored,
    read_all_stored,
    read_stored,
    remove_stored,
    sweep_stored,
)

RECORD_OF_WEB = StoredRecord("web", "./root", 1.5, "ext4", 1 << 20, Base("base", "raw", 4, 5), {"memory": "1G"})


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMKIT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def make_web() -> None:
    with make_stored("web") as new:
        new.record = RECORD_OF_WEB


def test_machine_is_made_found_and_removed(data: Path) -> None:
    assert (list_names(), is_stored("web")) == ([], False)
    make_web()
    assert (list_names(), is_stored("web")) == (["web"], True)
    found = read_stored("web")
    assert found.require_record() == RECORD_OF_WEB
    assert found.folder == data / "machines/web"
    assert found.folder.stat().st_mode & 0o777 == 0o700
    assert not found.is_held
    remove_stored("web")
    assert (list_names(), [path.name for path in (data / "machines").iterdir()]) == ([], [".machines.lock"])
    with pytest.raises(MachineError, match="there is no stored machine 'web'"):
        remove_stored("web")


def test_name_is_taken_once() -> None:
    make_web()
    with pytest.raises(NameInUseError, match="there is a stored machine 'web' already") as caught:
        make_web()
    assert caught.value.hint == "vmkit up web starts it; vmkit rm web removes it with its disk"
    with make_stored("db") as new:
        with pytest.raises(NameInUseError, match="another program creates the machine 'db' now"), make_stored("db"):
            pass
        new.record = RECORD_OF_WEB
    assert list_names() == ["db", "web"]


def test_failed_making_leaves_nothing(data: Path) -> None:
    with (
        pytest.raises(HostError, match=r"cannot write to the data folder .*: No space left"),
        make_stored("web") as new,
    ):
        (new.folder / "disk").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in (data / "machines").iterdir()] == [".machines.lock"]


def test_killed_making_leaves_nothing_for_long(data: Path) -> None:
    code = (
        "import os, signal\n"
        "from vmkit.stored.store import make_stored\n"
        "with make_stored('web') as new:\n"
        "    (new.folder / 'disk').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (data / "machines/.new.web").is_dir()
    assert (list_names(), read_all_stored()) == ([], [])
    sweep_stored()
    assert not (data / "machines/.new.web").exists()
    make_web()
    sweep_stored()
    # A machine's lock is free whenever it does not run.
    assert read_stored("web").require_record() == RECORD_OF_WEB


def test_machine_has_one_holder_and_its_holder_keeps_it() -> None:
    make_web()
    web = read_stored("web")
    with lock_stored(web) as fd:
        copy = os.dup(fd)
    # A monitor has a copy of the descriptor.
    assert web.is_held
    with pytest.raises(MachineError, match="the machine 'web' is running") as caught, lock_stored(web):
        pass
    assert caught.value.hint == "vmkit down web"
    with pytest.raises(MachineError, match="the machine 'web' is running"):
        remove_stored("web")
    os.close(copy)
    remove_stored("web")
    with pytest.raises(MachineError, match="there is no stored machine 'web' any more"), lock_stored(web):
        pass


def test_damaged_record_is_shown_and_removed() -> None:
    make_web()
    web = read_stored("web")
    whole = json.loads((web.folder / RECORD).read_bytes())
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 10000, json.dumps(whole | {"schema": 2}).encode()):
        (web.folder / RECORD).write_bytes(text)
        with pytest.raises(MachineError, match="the record of the machine 'web' is damaged: ") as caught:
            read_stored("web").require_record()
        assert "its disk is " in caught.value.hint
    (web.folder / RECORD).unlink()
    assert [(one.name, one.trouble) for one in read_all_stored()] == [
        ("web", "cannot read it: No such file or directory")
    ]
    (web.folder / "lock").unlink()
    remove_stored("web")
    assert list_names() == []


@pytest.mark.parametrize(
    "wrong",
    [{"disk_bytes": True}, {"disk_bytes": "1"}, {"disk_bytes": 513}, {"options": []}, {"base": {}}, {"root": None}],
)
def test_record_with_wrong_values_is_no_record(wrong: dict[str, object]) -> None:
    value = json.loads(render_record(RECORD_OF_WEB))
    assert parse_record(json.dumps(value).encode()) == RECORD_OF_WEB
    with pytest.raises(ValueError, match=r"its disk_bytes or its base's format is wrong|it is no record"):
        parse_record(json.dumps(value | wrong).encode())


def test_folder_that_others_can_write_to_is_refused(data: Path) -> None:
    make_web()
    find_machines_folder().chmod(0o777)
    with pytest.raises(HostError, match="other users can write to the data folder"):
        is_stored("web")
    with pytest.raises(HostError, match="other users can write to the data folder"):
        make_web()


def test_user_without_a_home_has_no_stored_machines_and_can_make_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VMKIT_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    # As for a user without HOME whose number has no name.
    monkeypatch.setenv("HOME", "~")
    assert (is_stored("tiny"), list_names(), read_all_stored()) == (False, [], [])
    sweep_stored()
    with pytest.raises(HostError, match="there is no home directory to keep machines in"):
        make_web()
    with pytest.raises(HostError, match="there is no home directory to keep machines in"):
        remove_stored("web")


@pytest.mark.root
def test_user_who_cannot_look_into_the_folder_has_no_stored_machines() -> None:
    make_web()
    assert ask_as_other(lambda: (is_stored("web"), list_names(), read_all_stored())) == "(False, [], [])"


def test_word_that_is_too_long_for_a_file_is_no_machine(data: Path) -> None:
    make_web()
    assert not is_stored("a" * 300)


def test_words_that_are_no_names_are_no_machines(data: Path) -> None:
    make_web()
    for word in ("../machines/web", "web/", ".", "..", "", "-", "docker://web", "web.toml"):
        assert not is_stored(word)


def test_machine_that_cannot_be_removed_is_not_called_removed(data: Path) -> None:
    make_web()
    # A file where the folder would go.
    (data / f"machines/.old.web.{os.getpid()}").write_text("")
    with pytest.raises(HostError, match="cannot write to the data folder"):
        remove_stored("web")
    assert list_names() == ["web"]


def test_folder_that_is_a_link_loses_its_name_and_keeps_its_files(data: Path) -> None:
    make_web()
    (data / "machines/web").rename(data / "elsewhere")
    (data / "machines/web").symlink_to(data / "elsewhere")
    remove_stored("web")
    assert [path.name for path in (data / "machines").iterdir()] == [".machines.lock"]
    assert (data / "elsewhere" / RECORD).is_file()


def test_what_a_killed_removal_left_is_swept(data: Path) -> None:
    make_web()
    (data / "machines/.old.db.1").mkdir()
    (data / "machines/.old.mail.1").symlink_to(data / "none")
    sweep_stored()
    assert sorted(path.name for path in (data / "machines").iterdir()) == [".machines.lock", "web"]
