"""The registry's reading side: what counts as a machine, what is skipped, which runtime directories are refused."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.vsh.live import ENVIRONMENT
from vsh import registry
from vsh.errors import VshError
from vsh.registry import describe_detour, find_machine, find_runtime_directory, read_machines


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runtime"
    (root / "machines").mkdir(parents=True)
    root.chmod(0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(root))
    return root


class Enter(Protocol):
    """The fixture enter."""

    def __call__(self, name: str, record: dict[str, object] | bytes, *, held: bool = True) -> None: ...


@pytest.fixture
def enter(runtime: Path) -> Iterator[Enter]:
    """enter(name, record) makes an entry; its lock is held until the test ends, unless held=False."""
    locks = []

    def make(name: str, record: dict[str, object] | bytes, *, held: bool = True) -> None:
        directory = runtime / "machines" / name
        directory.mkdir()
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        (directory / "machine.json").write_bytes(text)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        locks.append(lock)

    yield make
    for lock in locks:
        os.close(lock)


def record(name: str, cid: int, **more: object) -> dict[str, object]:
    return {"schema": 1, "name": name, "cid": cid, "state": "ready", "pid": 1, **more}


def test_machines_are_listed_by_name_with_what_the_contract_says(enter: Enter, runtime: Path) -> None:
    enter("b", record("b", 4, backend="vhost", vsock=None))
    enter("a", record("a", 3, backend="user", vsock="/run/x", unknown=["ignored"]))
    a, b = read_machines()
    assert (a.name, a.cid, a.backend, a.state, a.pid, a.vsock) == ("a", 3, "user", "ready", 1, "/run/x")
    assert (b.name, b.vsock) == ("b", None)
    assert a.directory == str(runtime / "machines" / "a")


def test_machine_is_found_by_name_and_by_cid(enter: Enter) -> None:
    enter("a", record("a", 3))
    enter("b", record("b", 4))
    by_name, by_cid = find_machine(name="b"), find_machine(cid=3)
    assert by_name
    assert by_name.cid == 4
    assert by_cid
    assert by_cid.name == "a"
    assert find_machine(name="c") is None
    assert find_machine(cid=5) is None


def test_entry_with_a_free_lock_is_no_machine(enter: Enter) -> None:
    enter("a", record("a", 3), held=False)
    assert read_machines() == []


def test_asking_for_a_lock_does_not_take_it(enter: Enter, runtime: Path) -> None:
    """Two readers at once, or a reader and a sweeper, must not take one another for a monitor."""
    enter("a", record("a", 3), held=False)
    with (runtime / "machines" / "a" / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert read_machines() == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"name"',
        b"\xff\xfe",
        b'{"cid": 3}',
        b'{"name": "a"}',
        b'{"name": "a", "cid": "x"}',
        b'{"name": "a", "cid": 3, "pid": null}',
        b'{"name": "other", "cid": 3}',
        b"[" * 60_000,
        b"9" * 60_000,
        b'{"name": "a", "cid": 3, "fill": "' + b"x" * registry.MAX_RECORD_BYTES + b'"}',
    ],
)
def test_unreadable_record_is_skipped(enter: Enter, text: bytes) -> None:
    enter("a", text)
    enter("b", record("b", 4))
    assert [machine.name for machine in read_machines()] == ["b"]


def test_entries_being_made_or_removed_are_skipped(enter: Enter, runtime: Path) -> None:
    enter(".new.a", record(".new.a", 3))
    (runtime / "machines" / "stray file").write_text("")
    (runtime / "machines" / "empty").mkdir()
    assert read_machines() == []


def test_no_runtime_directory_means_no_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "nothing"))
    assert read_machines() == []


def test_registry_that_is_a_file_is_told(runtime: Path) -> None:
    (runtime / "machines").rmdir()
    (runtime / "machines").write_text("")
    with pytest.raises(VshError, match="cannot read the registry of machines"):
        read_machines()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_runtime_directory_open_to_others_is_refused(runtime: Path, mode: int) -> None:
    runtime.chmod(mode)
    with pytest.raises(VshError, match="other users have access to the runtime directory") as caught:
        find_runtime_directory()
    assert caught.value.hint == f"chmod 700 {runtime}"


def test_runtime_directory_that_is_a_symlink_is_refused(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(runtime)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(link))
    with pytest.raises(VshError, match="is not a directory"):
        find_runtime_directory()


def test_runtime_directory_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(VshError, match="is not a directory"):
        find_runtime_directory()


def test_runtime_directory_below_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(VshError, match="cannot look at the runtime directory"):
        find_runtime_directory()


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    """A directory that belongs to somebody else, whoever runs the tests."""
    if os.geteuid() != 0:
        return "/"
    os.chown(tmp_path, 65534, -1)
    return str(tmp_path)


def test_runtime_directory_of_somebody_else_is_refused(foreign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", foreign)
    with pytest.raises(VshError, match=r"belongs to uid \d+, not to you"):
        find_runtime_directory()


def test_xdg_runtime_directory_is_used_when_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMKIT_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_runtime_directory() == str(tmp_path / "vmkit")


@pytest.mark.parametrize("value", ["", "/nonexistent", "/dev/null"])
def test_xdg_runtime_directory_that_is_none_is_passed_over(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMKIT_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    path = find_runtime_directory()
    assert path in (f"/run/user/{os.geteuid()}/vmkit", f"/tmp/vmkit-{os.geteuid()}")


def test_xdg_runtime_directory_of_another_user_is_passed_over(foreign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after sudo: what is made there would lock its owner out."""
    monkeypatch.delenv("VMKIT_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", foreign)
    assert find_runtime_directory() != f"{foreign}/vmkit"


# `vsh true` prints it, too, but would run in the only machine of a developer who has one.
@pytest.mark.parametrize("words", [["-m", "vmkit", "list"], ["-m", "vsh", "--vm_name=no-such-machine"]])
def test_directory_that_is_used_instead_of_another_users_is_named(foreign: str, words: list[str]) -> None:
    env = {**ENVIRONMENT, "XDG_RUNTIME_DIR": foreign}
    told = subprocess.run([sys.executable, *words], env=env, capture_output=True, check=False).stderr.decode()
    assert re.search(rf"XDG_RUNTIME_DIR={re.escape(foreign)} belongs to uid \d+; the machines are in /\S+\n", told)


def test_runtime_directory_that_is_used_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("VMKIT_RUNTIME_DIR", raising=False)
    assert describe_detour() == ""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/1")
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path))
    assert describe_detour() == ""


def test_relative_runtime_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", "here")
    assert find_runtime_directory() == str(tmp_path / "here")


def test_looking_for_the_runtime_directory_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(tmp_path / "not-yet"))
    find_runtime_directory()
    read_machines()
    assert list(tmp_path.iterdir()) == []
